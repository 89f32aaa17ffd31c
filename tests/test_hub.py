"""Models by their names on the Hub, which here is a server on this machine."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from glm_fused.checkpoint import hub as hubs
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.hub import local_model
from glm_fused.checkpoint.hub_names import HubName, hub_name
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.cli import main

pytest_plugins = ("hub_server",)
NAME, WEIGHTS = "makers/demo-model", "model.safetensors"  # as the plugin has them


def same(found, folder):
    """Whether a folder has the model that ``folder`` has, bytes and all."""
    checkpoint = Checkpoint.open(found)
    files = {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"}
    files |= {"tokenizer_config.json", *checkpoint.files}
    return all((Path(found) / f).read_bytes() == (folder / f).read_bytes() for f in files)


def test_a_model_comes_with_what_it_needs_and_no_more(hub, repository):
    found = Path(local_model(NAME))
    assert same(found, repository)
    have = {path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()}
    assert have == set(hub.fetched()) == {path.name for path in bundled_folder().iterdir()}
    asked = len(hub.asked)
    assert local_model(NAME) == found  # only what the name stands for is asked again
    assert not [path for _, path, _ in hub.asked[asked:] if "/resolve/" in path]
    commit = hub.commit(NAME)
    assert local_model(f"{NAME}@{commit}") == local_model(f"{NAME}@main") == found
    (repository / "generation_config.json").write_text('{"do_sample": false}')
    other = Path(local_model(NAME))
    assert other != found
    assert (other / "generation_config.json").read_text() == '{"do_sample": false}'
    assert hub.fetched(WEIGHTS) == [WEIGHTS]  # what is the same is not fetched again


def test_shards_are_those_of_the_index(hub, repository):
    (repository / WEIGHTS).rename(repository / "model-00001-of-00001.safetensors")
    tensors = Checkpoint.open(bundled_folder()).tensors
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    (repository / "consolidated.safetensors").write_bytes(b"the same in another form")
    assert same(local_model(NAME), repository)
    assert "consolidated.safetensors" not in hub.fetched()
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files of weights.*model-00002"):
        local_model(NAME)


def test_a_cut_connection_is_taken_up_where_it_was_cut(hub, repository, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before the next attempt
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk := 1 << 16)
    hub.breaks[WEIGHTS] = cut = 1_234_567
    assert same(local_model(NAME), repository)
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and asked]
    assert ranges == [f"bytes={cut // chunk * chunk}-"]


def test_a_killed_download_keeps_the_files_that_it_had(hub, repository, monkeypatch, tmp_path):
    hub.slow.add(WEIGHTS)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-m", "glm_fused", "inspect", NAME]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        others = [file for file in map(str, hub.files(NAME)) if file in _small()]
        while time.monotonic() < deadline and not (
            hub.fetched(WEIGHTS) and len(_cached(tmp_path)) == len(others)
        ):
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    assert _cached(tmp_path) == set(others)
    hub.slow.clear()
    hub.release.set()
    hub.asked.clear()
    found = local_model(NAME)
    assert same(found, repository)
    assert hub.fetched() == [WEIGHTS]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    assert local_model(NAME) == found


def _small():
    return {path.name for path in bundled_folder().iterdir()} - {WEIGHTS}


def _cached(tmp_path):
    """The names of the files that snapshots in the cache have."""
    return {path.name for path in (tmp_path / "cache").glob("*/snapshots/*/*") if path.is_file()}


def test_what_is_not_whole_is_refused_offline(hub, monkeypatch):
    found = Path(local_model(NAME))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_model(NAME) == found
    (found / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither safetensors.*cannot be asked"):
        local_model(NAME)
    with pytest.raises(FileNotFoundError, match=r"does not exist here.*cannot be asked"):
        local_model(f"{NAME}@other")


def one_line(capsys, *arguments):
    """The one line of an error that a command ends with."""
    assert main([*arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("glm-fused: ")]
    assert (out, len(lines)) == ("", 1)
    return lines[0]


def test_errors_are_one_line(capsys, hub, repository, monkeypatch):
    line = one_line(capsys, "inspect", "makers/nothing")
    assert "makers/nothing does not exist, neither here nor on http://127.0.0.1" in line
    assert "has no such revision" in one_line(capsys, "inspect", f"{NAME}@v9")
    hub.refuses[NAME] = (403, "GatedRepo")
    line = one_line(capsys, "generate", "--model", NAME, "--prompt", "x")
    assert f"is gated: accept its terms at {hub.url}/{NAME}, and log in" in line
    hub.refuses[NAME] = (401, "")
    assert "the Hub refuses: " in one_line(capsys, "inspect", NAME)
    hub.refuses[NAME] = (503, "")
    assert "the Hub cannot be asked" in one_line(capsys, "inspect", NAME)
    hub.refuses.clear()
    monkeypatch.setattr(hubs, "free_bytes", lambda folder: 1000)
    assert "takes 6.47 MB more" in one_line(capsys, "inspect", NAME)
    assert not hub.fetched()
    for file in repository.iterdir():
        if file.is_file() and file.name != "README.md":
            file.unlink()
    assert "has neither safetensors nor GGUF files" in one_line(capsys, "inspect", NAME)


def test_gguf_models_go_by_their_variants(hub, repository):
    for path in list(repository.iterdir()):
        if path.is_file():
            path.unlink()
    names = ["M-Q4_K_M.gguf", "M-IQ2_K.gguf", *(f"M-Q2_K-0000{i}-of-00002.gguf" for i in (1, 2))]
    for name in names:
        (repository / name).write_bytes(name.encode())
    assert Path(local_model(f"{NAME}:q4_k_m")).name == "M-Q4_K_M.gguf"
    assert hub.fetched() == ["M-Q4_K_M.gguf"]
    found = Path(local_model(f"{NAME}@main:Q2_K"))
    assert found.name == names[2]
    assert {path.name for path in found.parent.iterdir()} == {*names[2:], "M-Q4_K_M.gguf"}
    with pytest.raises(ValueError, match="has 3 GGUF models, expected one that is named as"):
        local_model(NAME)
    with pytest.raises(ValueError, match=r"no GGUF model Q4_K, .*M-IQ2_K, M-Q2_K, M-Q4_K_M\."):
        local_model(f"{NAME}:Q4_K")
    (repository / names[0]).rename(repository / "M-UD-Q4_K_M.gguf")
    for name in names[1:]:
        (repository / name).unlink()
    assert Path(local_model(NAME)).name == "M-UD-Q4_K_M.gguf"


def test_what_is_here_keeps_its_meaning(hub, repository, tmp_path):
    here = tmp_path / "here" / NAME
    shutil.copytree(bundled_folder(), here)
    assert local_model(NAME) == NAME
    assert Checkpoint.open(local_model(NAME)).path == Path(NAME)
    for text in (
        "demo",
        "",
        "a",
        "./a/b",
        "/a/b",
        "~/a/b",
        "a/b/c",
        "a/",
        "/a",
        "a/b.gguf",
        "a b/c",
    ):
        assert local_model(text) == text
    assert local_model(Path("a/b")) == Path("a/b")
    assert hub.asked == []


def test_names():
    assert hub_name("a/b@v1:Q4_K") == HubName("a/b", "v1", "Q4_K")
    assert hub_name("zai-org/GLM-5.2") == HubName("zai-org/GLM-5.2")
    assert hub_name("a/b@refs/pr/1") == HubName("a/b", "refs/pr/1")
    for text in ("a/b", "a/b@v1", "a/b:Q4", "a/b@v1:Q4"):
        assert str(hub_name(text)) == text
    assert all(
        hub_name(text) is None for text in ("a/b@", "a/b:", "a/b@x@y", "-a/b", "ä/b", "a/b\n")
    )


def test_a_small_model_for_drafts_may_be_the_hubs(capsys, hub):
    arguments = ["generate", "--model", "demo", "--prompt", "def main():", "--max-tokens", "5"]
    assert main(arguments) == 0
    alone = capsys.readouterr().out
    assert main([*arguments, "--draft", "2", "--draft-from", NAME]) == 0
    assert capsys.readouterr().out == alone
    assert WEIGHTS in hub.fetched()
