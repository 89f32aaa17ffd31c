"""Packed sidecars: what is written, resumed, refused; and the commands around them."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from test_generate import write_tokenizer
from test_streaming import AFFINE, run, same, stream

from glm_fused import _ext
from glm_fused.cli import main
from glm_fused.loader import load_model
from glm_fused.pack import pack
from glm_fused.sidecar import PAGE, Sidecar


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    write_checkpoint(path / "model", tiny_config(), quantization=AFFINE, shards=2)
    write_tokenizer(path / "model")
    pack(path / "model", path / "sidecar")
    return path


@pytest.fixture
def folders(original, tmp_path):
    """A copy of a checkpoint and its sidecar."""
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy" / "model", tmp_path / "copy" / "sidecar"


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_layout(folders):
    model, path = folders
    sidecar = Sidecar.open(path)
    tensors = mx.load(str(model / "model-00001-of-00002.safetensors"))
    tensors |= mx.load(str(model / "model-00002-of-00002.safetensors"))
    manifest = json.loads((path / "manifest.json").read_text())
    assert [layer.layer for layer in sidecar.layers] == [1, 2, 3, 4]
    for layer, entry in zip(sidecar.layers, manifest["layers"], strict=True):
        data = (path / layer.file).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert len(data) == entry["size"] == PAGE + 8 * layer.slab
        assert layer.slab % PAGE == 0
        for e in range(8):
            at, parts = PAGE + e * layer.slab, []
            for part in layer.parts:
                tensor = tensors[f"model.layers.{layer.layer}.mlp.switch_mlp.{part.name}"][e]
                bits = mx.uint16 if tensor.dtype == mx.bfloat16 else tensor.dtype
                parts.append(np.array(tensor.view(bits)).tobytes())
                assert data[at : at + part.nbytes] == parts[-1]
                at += part.nbytes
            assert _ext.checksum(parts) == layer.checksums[e]


def test_packing_again_changes_nothing(folders):
    model, path = folders
    before = contents(path)
    pack(model, path)
    assert contents(path) == before


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_packing_goes_on(folders, monkeypatch, finished):
    """With what an interrupted run leaves: some layers, a piece of another."""
    model, path = folders
    whole = contents(path)
    manifest = json.loads(whole["manifest.json"])
    manifest["layers"] = manifest["layers"][:finished]
    (path / "manifest.json").unlink()
    (path / "manifest.unfinished.json").write_text(json.dumps(manifest))
    for i in range(finished + 1, 5):
        (path / f"layer_00{i}.bin").unlink()
    (path / f"layer_00{finished + 1}.bin.tmp").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not finished: run `sidecar pack` again"):
        Sidecar.open(path)
    kept = {p.name: p.stat().st_mtime_ns for p in path.glob("layer_*.bin")}
    pack(model, path)
    assert contents(path) == whole
    assert all((path / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_a_killed_packer(folders, original):
    """kill -9, wherever it strikes; the next run ends with the same files."""
    model, path = folders
    whole = contents(path)
    shutil.rmtree(path)
    command = [sys.executable, "-m", "glm_fused", "sidecar", "pack", "--model", model, path]
    process = subprocess.Popen(list(map(str, command)))
    deadline = time.monotonic() + 60
    while not list(path.glob("layer_*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    pack(model, path)
    assert contents(path) == whole


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as Linux has it")
def test_a_disk_that_fills_up(folders):
    model, path = folders
    whole = contents(path)
    shutil.rmtree(path)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "glm_fused", "sidecar", "pack", "--model", model, path]
    result = subprocess.run(
        list(map(str, command)), preexec_fn=limit, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "layer_001.bin" in result.stderr
    assert "finished layers are kept" in result.stderr
    assert not list(path.glob("*.tmp"))
    pack(model, path)
    assert contents(path) == whole


def test_too_small_a_disk_is_refused_at_once(folders, monkeypatch):
    model, path = folders
    shutil.rmtree(path)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needed, 1\.00 kB free"):
        pack(model, path)


def damage(path, file, at, data=b"\xff\x00\xff"):
    with (path / file).open("r+b") as f:
        f.seek(at)
        f.write(data)


def test_damaged_experts_are_never_used(folders, capsys):
    model, path = folders
    expected = run(load_model(model)[0])
    for layer in (1, 2, 3, 4):
        damage(path, f"layer_00{layer}.bin", PAGE + 3 * 32768 + 17)  # expert 3
    assert main(["sidecar", "verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert out.count("SHA-256") == 4
    streamed, _ = load_model(model, stream=stream(4, sidecar=path))
    with pytest.raises(RuntimeError, match=r"layer (\d), expert 3: .*layer_00\1\.bin: damaged"):
        run(streamed)
    assert same(run(load_model(model, stream=stream(4))[0]), expected)


def test_wrong_hashes_are_found(folders, capsys):
    _, path = folders
    text = (path / "manifest.json").read_text()
    sha = json.loads(text)["layers"][0]["sha256"]
    (path / "manifest.json").write_text(text.replace(sha, "0" * 64))
    assert main(["sidecar", "verify", str(path), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert list(result["wrong"]) == ["layer_001.bin"]


def test_a_sound_sidecar_verifies(folders, capsys):
    _, path = folders
    assert main(["sidecar", "verify", str(path)]) == 0
    assert capsys.readouterr().out.count("ok") == 4
    assert main(["sidecar", "inspect", str(path)]) == 0
    assert "layer_003.bin  8 experts of 32.77 kB" in capsys.readouterr().out


def swap(path):
    a, b, spare = (path / name for name in ("layer_001.bin", "layer_002.bin", "spare"))
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


FAULTS = {
    "swapped": (swap, "not this sidecar's layer 1"),
    "truncated": (lambda p: os.truncate(p / "layer_002.bin", 50000), "50000 bytes, expected"),
    "missing": (lambda p: (p / "layer_004.bin").unlink(), r"layer_004\.bin: no such file"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
    "manifest": (lambda p: (p / "manifest.json").write_text("{}"), r"is \(None, None\), expected"),
    "json": (lambda p: (p / "manifest.json").write_text("{"), "not valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sidecar_that_is_not_whole_is_refused(folders, fault):
    model, path = folders
    break_it, message = FAULTS[fault]
    break_it(path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(model, stream=stream(sidecar=path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 16384),
        ("layer", "../1"),
        ("layer", -1),
        ("parts", [["gate_proj.weight", "U32", [-1, 4]]]),
        ("parts", [["gate_proj.weight", "X9", [1, 4]]]),
        ("checksums", ["zz"]),
        ("checksums", None),
    ],
)
def test_a_malformed_manifest_is_refused(folders, key, value):
    _, path = folders
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["layers"][1][key] = value
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is malformed"):
        Sidecar.open(path)


def test_the_sidecar_of_another_checkpoint_is_refused(folders, tmp_path):
    _, path = folders
    other = write_checkpoint(tmp_path / "other", tiny_config(), quantization=AFFINE, seed=1)
    with pytest.raises(ValueError, match="was packed from a checkpoint with id"):
        load_model(other, stream=stream(sidecar=path))
    with pytest.raises(ValueError, match="is of another checkpoint"):
        pack(other, path)


def generate_command(model, *more):
    base = ["generate", "--model", str(model), "--prompt", "w3 w4 w5", "--raw"]
    return [*base, "--max-tokens", "12", "--json", *more]


def test_generate_streams(folders, tmp_path, capsys):
    model, path = folders
    assert main(generate_command(model)) == 0
    expected = json.loads(capsys.readouterr().out)["tokens"]
    trace = tmp_path / "trace.jsonl"
    more = ["--memory-budget", "8GB", "--slots", "3", "--sidecar", str(path), "--direct-io"]
    assert main(generate_command(model, *more, "--trace", str(trace))) == 0
    result = capsys.readouterr()
    document = json.loads(result.out)
    assert document["tokens"] == expected
    assert document["streaming"]["misses"] > 0
    assert "slots" in result.err
    assert "3 of 8 x 4 layers" in result.err
    assert main(["replay", str(trace), "--bank", "2,4,8", "--read-rate", "1GB"]) == 0
    assert "optimum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--memory-budget", "10MB"], "10.00 MB cannot hold"),
        (["--memory-budget", "much"], "expected a size"),
        (["--trace", "x"], "--trace needs"),
        (["--slots", "3", "--context", "5"], "exceed the 5 that memory was planned for"),
        (["--slots", "3", "--read-split", "5000"], "whole 4096-byte blocks"),
        (["--sidecar", "nowhere"], "nowhere has no manifest.json"),
        (["--slots", "3", "--pins", "none.json"], "none.json: no such file"),
    ],
)
def test_generate_refuses(folders, capsys, more, message):
    model, _ = folders
    assert main(generate_command(model, *more)) == 2
    assert message in capsys.readouterr().err
