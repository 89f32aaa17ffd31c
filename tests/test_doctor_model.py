"""``glm-fused doctor --model``: whether and how a model runs here, from its headers alone."""

import json
import os
import shutil

import pytest
from conftest import tiny_config, write_checkpoint
from gguf_files import write_gguf
from huggingface_hub import constants
from test_generate import write_tokenizer
from test_hub import NAME, WEIGHTS, one_line

from glm_fused.checkpoint import hub as hubs
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.hub import ask
from glm_fused.checkpoint.hub_files import files_of
from glm_fused.checkpoint.hub_headers import write_headers
from glm_fused.checkpoint.hub_names import HubName
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.cli import main
from glm_fused.measuring import disk, fit
from glm_fused.memory import resident_bytes
from glm_fused.streaming import budget

pytest_plugins = ("hub_server",)


@pytest.fixture(autouse=True)
def small_yardstick(monkeypatch):
    monkeypatch.setattr(fit, "YARDSTICK_BYTES", 4 << 20)
    monkeypatch.setattr(disk, "PROBE_BYTES", 8 << 20)


def doctor(capsys, *arguments):
    """The exit code and the document that the command prints."""
    code = main(["doctor", "--model", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def machine(monkeypatch, nbytes):
    """Have this machine so much memory."""
    monkeypatch.setattr(fit, "machine_bytes", lambda: nbytes)
    monkeypatch.setattr(budget, "machine_bytes", lambda: nbytes)


def test_a_model_that_fits(capsys):
    code, found = doctor(capsys, "demo")
    assert (code, found["ok"], found["runs"]) == (0, True, "resident")
    read, speed = found["read"]["memory"], found["tokens_per_second"]["at_most"]
    assert speed == pytest.approx(read * 1e9 / found["bytes_read_per_token"])
    assert found["read"]["disk"] is None
    assert main(["doctor", "--model", "demo"]) == 0
    out = capsys.readouterr().out
    assert "runs        with all of it in memory, at most " in out
    assert "GLM-5.2" in out


def wide(tmp_path, name="wide"):
    """A model most of which are experts."""
    config = tiny_config(n_routed_experts=64, moe_intermediate_size=512, num_hidden_layers=3,
                         indexer_types=["full", "full", "shared"])  # fmt: skip
    write_checkpoint(tmp_path / name, config)
    write_tokenizer(tmp_path / name)
    return tmp_path / name


def test_a_model_that_is_streamed(capsys, monkeypatch, tmp_path):
    path = str(wide(tmp_path))
    assert doctor(capsys, path)[1]["runs"] == "resident"
    machine(monkeypatch, Checkpoint.open(path).nbytes)
    room = lambda direct: resident_bytes() + budget.PROCESS_GROWTH + 400_000_000  # noqa: E731
    monkeypatch.setattr(budget, "affordable_bytes", room)
    code, found = doctor(capsys, path)
    assert (code, found["runs"], found.get("experts")) == (0, "streamed", 64), found
    assert 2 <= found["slots"] <= 64
    assert found["read"]["disk"] > 0
    speed = found["tokens_per_second"]
    assert 0 < speed["no_hits"] <= speed["at_random"]
    assert main(["doctor", "--model", path]) == 0
    assert "with --memory-budget auto, " in capsys.readouterr().out


def test_speeds_of_a_streamed_model():
    layers = [{"experts": None, "expert_bytes_per_token": 0}]
    layers += [{"experts": 8, "expert_bytes_per_token": 40}] * 2
    about = {"bytes_read_per_token": 100, "each_layer": layers}

    class Plan:
        slots = 6

    speed = fit._streamed_speed(about, Plan, 50.0, 10.0)
    assert speed["no_hits"] == pytest.approx(1 / (100 / 50 + 80 / 10))
    assert speed["at_random"] == pytest.approx(1 / (100 / 50 + 80 / 4 / 10))
    Plan.slots = 9  # more than a layer has
    assert fit._streamed_speed(about, Plan, 50.0, 10.0)["at_random"] == pytest.approx(0.5)


def test_a_model_that_does_not_run(capsys, monkeypatch, tmp_path):
    machine(monkeypatch, 10_000_000)
    code, found = doctor(capsys, "demo")
    assert (code, found["ok"], found["runs"]) == (1, False, "no")
    assert "cannot hold" in found["why"]
    other = wide(tmp_path)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    code, found = doctor(capsys, str(other))
    assert (code, found["runs"]) == (1, "no")
    assert "llama" in found["why"]
    assert main(["doctor", "--model", str(other)]) == 1
    assert "runs        not at all: " in capsys.readouterr().out
    assert "does not exist" in one_line(capsys, "doctor", "--model", str(tmp_path / "none"))


def test_before_a_download(capsys, hub, repository):
    code, found = doctor(capsys, NAME)
    here = doctor(capsys, "demo")[1]
    same = ("runs", "variant", "parameters", "bytes_loaded", "bytes_read_per_token")
    assert code == 0
    assert [found[key] for key in same] == [here[key] for key in same]
    assert found["commit"] == hub.commit(NAME)
    total = sum(path.stat().st_size for path in bundled_folder().iterdir())
    assert found["download"]["bytes"] == total
    assert found["download"]["left"] >= (repository / WEIGHTS).stat().st_size
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and WEIGHTS in path]
    assert ranges == ["bytes=0-131071"]
    hubs.local_model(NAME)
    assert doctor(capsys, NAME)[1]["download"]["left"] == 0
    assert "no such revision" in one_line(capsys, "doctor", "--model", f"{NAME}@v9")


def test_a_download_that_the_disk_has_no_room_for(capsys, hub, monkeypatch):
    monkeypatch.setattr(hubs, "free_bytes", lambda folder: 1000)
    code, found = doctor(capsys, NAME)
    assert (code, found["ok"], found["runs"]) == (1, False, "resident")
    assert main(["doctor", "--model", NAME]) == 1
    assert "1.00 kB free: too few" in capsys.readouterr().out


def test_without_the_hub_what_is_here_serves(capsys, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "cannot be asked" in one_line(capsys, "doctor", "--model", NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hubs.local_model(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor(capsys, NAME)[1]["runs"] == "resident"


@pytest.mark.parametrize("layout", ["hf", "mlx", "gguf"])
def test_headers_from_the_hub_are_those_of_the_files(hub, repository, tmp_path, layout):
    shutil.rmtree(repository)
    repository.mkdir()
    if layout == "gguf":
        write_gguf(repository / "model.gguf", tiny_config())
    else:
        shards = 3 if layout == "hf" else 1
        write_checkpoint(repository, tiny_config(), layout=layout, shards=shards)
    name = HubName(NAME)
    commit, files = ask(name)
    chosen = files_of(name, files, lambda file: repository / file)
    out = tmp_path / "headers"
    out.mkdir()
    found = Checkpoint.open(write_headers(name, commit, chosen, out))
    real = Checkpoint.open(repository)
    assert (found.config, found.files, found.tensors) == (real.config, real.files, real.tensors)
    for file in real.files:
        assert (out / file).stat().st_blocks * 512 <= 1 << 20


def test_a_header_that_is_longer_than_what_is_asked_for_at_first(
    hub, repository, tmp_path, monkeypatch
):
    from glm_fused.checkpoint import hub_headers

    monkeypatch.setattr(hub_headers, "_FIRST", 1000)
    chosen = {WEIGHTS: (repository / WEIGHTS).stat().st_size}
    out = write_headers(HubName(NAME), hub.commit(NAME), chosen, tmp_path)
    shutil.copy(repository / "config.json", tmp_path)
    assert Checkpoint.open(out).tensors == Checkpoint.open(bundled_folder()).tensors
    assert len(hub.asked) == 2
    (repository / WEIGHTS).write_bytes(b"\xff" * 5000)
    with pytest.raises(ValueError, match="its header has no end"):
        write_headers(HubName(NAME), hub.commit(NAME), {WEIGHTS: 5000}, tmp_path)


def test_a_disk_is_read_whole(monkeypatch, tmp_path):
    file = tmp_path / "file"
    nbytes = 9 * (1 << 20) + 1234
    file.write_bytes(os.urandom(nbytes))
    read, original = [], disk._read
    monkeypatch.setattr(disk, "_read", lambda *a: read.append(original(*a)) or read[-1])
    assert disk.read_rate(file) > 0
    assert sum(read) == nbytes
    assert disk.folder_rate(tmp_path / "not" / "yet") > 0
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [file]
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is empty"):
        disk.read_rate(tmp_path / "empty")
