"""Packed sidecars: what is written, resumed and refused, and the commands around them."""

import errno
import fcntl
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
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.cli import main
from glm_fused.loader import load_model
from glm_fused.streaming.pack import _Packer, pack
from glm_fused.streaming.sidecar import PAGE, Sidecar
from glm_fused.streaming.source import ExpertReader


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
    """An interrupted run leaves some layers and a piece of another."""
    model, path = folders
    whole = contents(path)
    manifest = json.loads(whole["manifest.json"])
    manifest["layers"] = manifest["layers"][:finished]
    (path / "manifest.json").unlink()
    (path / "manifest.unfinished.json").write_text(json.dumps(manifest))
    for i in range(finished + 1, 5):
        (path / f"layer_00{i}.bin").unlink()
    (path / f"layer_00{finished + 1}.bin.tmp").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not finished: run `glm-fused sidecar import` again"):
        Sidecar.open(path)
    kept = {p.name: p.stat().st_mtime_ns for p in path.glob("layer_*.bin")}
    pack(model, path)
    assert contents(path) == whole
    assert all((path / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_a_killed_packer(folders, original):
    """Wherever kill -9 strikes, the next run ends with the same files."""
    model, path = folders
    whole = contents(path)
    shutil.rmtree(path)
    command = [sys.executable, "-m", "glm_fused", "sidecar", "import", "--model", model, path]
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

    command = [sys.executable, "-m", "glm_fused", "sidecar", "import", "--model", model, path]
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
        ("parts", [["gate_proj.weights", "U32", [1, 4]]]),
        ("parts", [[7, "U32", [1, 4]]]),
        ("parts", [["gate_proj.weight", "F64", [1, 4]]]),
        ("parts", []),
        ("checksums", ["zz"]),
        ("checksums", ["-1"]),
        ("checksums", ["1" + "0" * 16]),
        ("checksums", [7]),
        ("checksums", []),
        ("checksums", None),
        ("size", 278528.5),
        ("size", "x"),
        ("size", 10**400),
        ("sha256", None),
        ("layer", True),
        ("layer", 2.0),
        ("spare", 1),
    ],
)
def test_a_malformed_manifest_is_refused(folders, key, value):
    _, path = folders
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["layers"][1][key] = value
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is malformed"):
        Sidecar.open(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", []),
        ("layers", {}),
        ("layers", None),
        ("set", 7),
        ("shards", {}),
        ("shards", {"a": [1]}),
        ("shards", {"a": [1.5, 2]}),
    ],
)
def test_a_malformed_document_is_refused(folders, key, value):
    _, path = folders
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[key] = value
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is malformed"):
        Sidecar.open(path)


def test_the_sidecar_of_another_checkpoint_is_refused(folders, tmp_path):
    _, path = folders
    other = write_checkpoint(tmp_path / "other", tiny_config(), quantization=AFFINE, seed=1)
    with pytest.raises(ValueError, match="was packed from a checkpoint with id"):
        load_model(other, stream=stream(sidecar=path))
    with pytest.raises(ValueError, match="was packed from a checkpoint with id"):
        pack(other, path)


def fine_tune(model, layer=3, expert=5, at=lambda size: size // 2, keep_times=False):
    """Change a byte of an expert's up_proj and leave the routers; returns the shard."""
    info = Checkpoint.open(model).tensors[f"model.layers.{layer}.mlp.switch_mlp.up_proj.weight"]
    file, size = model / info.file, info.nbytes // 8
    times = file.stat()
    with file.open("r+b") as f:
        f.seek(info.start + expert * size + at(size))
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 0x10]))
    if keep_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    return file


def test_experts_that_changed_under_the_same_routers_are_refused(folders, capsys):
    """Loading, packing and verify refuse them, and nothing is overwritten."""
    model, path = folders
    before = contents(path)
    shard = fine_tune(model)
    with pytest.raises(ValueError, match=f"was packed before '{shard.name}' was written or copied"):
        load_model(model, stream=stream(sidecar=path))
    with pytest.raises(ValueError, match=r"layer_003\.bin is not what .*layer 3, expert 5 was ano"):
        pack(model, path)
    assert main(["sidecar", "verify", "--model", str(model), str(path)]) == 1
    assert "experts [5] are not the checkpoint's" in capsys.readouterr().out
    assert main(["sidecar", "verify", str(path)]) == 0  # it is whole, but another checkpoint's
    assert contents(path) == before


def test_a_fine_tune_is_noticed_whatever_its_files_times_say(folders, tmp_path):
    """The sample notices other experts in files of the same names, sizes and times."""
    model, path = folders
    tuned = write_checkpoint(
        tmp_path / "tuned", tiny_config(), quantization=AFFINE, shards=2, edit=other_experts
    )
    for file in model.glob("*.safetensors"):
        status = file.stat()
        assert (tuned / file.name).stat().st_size == status.st_size
        os.utime(tuned / file.name, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match=r"layer 1, expert 0: .* is not the checkpoint's"):
        load_model(tuned, stream=stream(sidecar=path))
    with pytest.raises(ValueError, match="was another when it was packed"):
        pack(tuned, path)


def other_experts(tensors):
    return {
        name: mx.contiguous(a[::-1]) if ".switch_mlp." in name else a for name, a in tensors.items()
    }


def test_an_edit_that_hides_is_found_by_packing_and_verify(folders, capsys):
    """It lies outside the sampled blocks, in a file with its old time, which loading cannot see."""
    model, path = folders
    fine_tune(model, keep_times=True)
    load_model(model, stream=stream(sidecar=path))
    with pytest.raises(ValueError, match="layer 3, expert 5 was another when it was packed"):
        pack(model, path)
    assert main(["sidecar", "verify", "--model", str(model), str(path)]) == 1
    assert "experts [5] are not the checkpoint's" in capsys.readouterr().out


def test_a_copied_checkpoint_is_compared_once(folders, capsys):
    """New times alone are refused until packing has compared every byte; it changes none."""
    model, path = folders
    before = contents(path)
    for file in model.glob("*.safetensors"):
        os.utime(file)
    with pytest.raises(ValueError, match="`glm-fused sidecar import` again compares everything"):
        load_model(model, stream=stream(sidecar=path))
    assert main(["sidecar", "verify", "--model", str(model), str(path)]) == 1
    assert "manifest.json  was packed before" in capsys.readouterr().out
    pack(model, path)
    load_model(model, stream=stream(sidecar=path))
    assert main(["sidecar", "verify", "--model", str(model), str(path)]) == 0
    after = contents(path)
    assert all(after[name] == before[name] for name in before if name.endswith(".bin"))


def test_going_on_over_changed_experts_is_refused(folders):
    model, path = folders
    unfinish(path, 3)
    before = contents(path)
    fine_tune(model, layer=2)
    with pytest.raises(ValueError, match=r"layer 2, expert 5 was another when it was packed"):
        pack(model, path)
    assert contents(path) == before


def unfinish(path, finished):
    """Leave what an interrupted run leaves after so many layers."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["layers"] = manifest["layers"][:finished]
    (path / "manifest.json").unlink()
    (path / "manifest.unfinished.json").write_text(json.dumps(manifest))
    for i in range(finished + 1, 5):
        (path / f"layer_00{i}.bin").unlink()


def set_parts(change):
    def edit(manifest):
        for layer in manifest["layers"]:
            change(layer["parts"])

    return edit


def swap_names(a, b):
    def change(parts):
        for part in parts:
            part[0] = {a: b, b: a}.get(part[0], part[0])

    return set_parts(change)


def bf16_as_f16(parts):
    for part in parts:
        part[1] = part[1].replace("BF16", "F16")


def drop_expert(manifest):
    """Drop an expert's entry and its slab, so that the file has the size that it should."""
    for layer in manifest["layers"]:
        layer["checksums"].pop()
        layer["size"] -= 32768


MISTAKEN = {
    "gate and up": swap_names("gate_proj.weight", "up_proj.weight"),
    "scales and biases": swap_names("up_proj.scales", "up_proj.biases"),
    "BF16 as F16": set_parts(bf16_as_f16),
    "reversed": set_parts(list.reverse),
    "shape": set_parts(lambda parts: parts[0][2].reverse()),
}


@pytest.mark.parametrize("fault", MISTAKEN)
def test_a_manifest_that_mistakes_the_experts_is_refused(folders, fault, capsys):
    """It is sound in itself and as long as it should be, but not what the checkpoint says."""
    model, path = folders
    expected = run(load_model(model)[0])
    manifest = json.loads((path / "manifest.json").read_text())
    MISTAKEN[fault](manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"layer 1 has .* where .* has "):
        load_model(model, stream=stream(sidecar=path))
    assert main(["sidecar", "verify", "--model", str(model), str(path)]) == 2
    pack(model, path)
    assert same(run(load_model(model, stream=stream(3, sidecar=path))[0]), expected)


@pytest.mark.parametrize("fault", ["layers", "experts"])
def test_a_manifest_of_fewer_experts_is_refused(folders, fault):
    model, path = folders
    manifest = json.loads((path / "manifest.json").read_text())
    if fault == "layers":
        del manifest["layers"][2]
    else:
        drop_expert(manifest)
        for file in path.glob("layer_*.bin"):
            os.truncate(file, file.stat().st_size - 32768)
    (path / "manifest.json").write_text(json.dumps(manifest))
    message = r"has layers \[1, 2, 4\], but" if fault == "layers" else "has 7 experts, but"
    with pytest.raises(ValueError, match=message):
        load_model(model, stream=stream(sidecar=path))


def test_a_sidecar_of_the_first_version_is_to_be_packed_again(folders, capsys):
    model, path = folders
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["version"] = 1
    del manifest["shards"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    for act in (lambda: load_model(model, stream=stream(sidecar=path)), lambda: pack(model, path)):
        with pytest.raises(
            ValueError, match=r"is of version 1, .* run `glm-fused sidecar import` ag"
        ):
            act()


DAMAGES = {
    "flipped": lambda p: damage(p, "layer_002.bin", PAGE + 3 * 32768 + 17),
    "header": lambda p: damage(p, "layer_002.bin", 3),
    "truncated": lambda p: os.truncate(p / "layer_002.bin", 100_000),
    "extended": lambda p: damage(p, "layer_002.bin", PAGE + 8 * 32768),
    "missing": lambda p: (p / "layer_002.bin").unlink(),
    "swapped": lambda p: swap(p),
}


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("fault", DAMAGES)
def test_packing_over_a_damaged_sidecar_mends_it(folders, fault, unfinished, capsys):
    model, path = folders
    whole = contents(path)
    if unfinished:
        unfinish(path, 3)
    DAMAGES[fault](path)
    kept = {p.name: p.stat().st_mtime_ns for p in path.glob("layer_*.bin")}
    assert main(["sidecar", "import", "--model", str(model), str(path)]) == 0
    assert "layer_002.bin" in capsys.readouterr().err
    assert contents(path) == whole
    packed = {"layer_002.bin"} | ({"layer_001.bin"} if fault == "swapped" else set())
    now = {name: (path / name).stat().st_mtime_ns for name in kept}
    assert {name for name in kept if now[name] != kept[name]} == packed & kept.keys()


def test_wrong_checksums_in_a_manifest_are_mended(folders):
    model, path = folders
    whole = contents(path)
    manifest = json.loads(whole["manifest.json"])
    manifest["layers"][1]["checksums"][4] = "0" * 16
    (path / "manifest.json").write_text(json.dumps(manifest))
    pack(model, path)
    assert contents(path) == whole


@pytest.mark.parametrize("other", [".", "..", "stranger"])
def test_folders_that_hold_something_else_are_refused(folders, other):
    model, _ = folders
    path = model / other
    path.mkdir(exist_ok=True)
    (path / "notes.txt").write_text("mine")
    before = sorted(path.iterdir())
    message = "holds 'notes.txt' and no sidecar" if other == "stranger" else "checkpoint's own"
    with pytest.raises(ValueError, match=message):
        pack(model, path)
    assert sorted(path.iterdir()) == before
    pack(model, model / "sidecar")  # a folder of its own may lie there


def test_a_checkpoint_written_to_while_it_is_packed_is_refused(folders, monkeypatch):
    model, path = folders
    shutil.rmtree(path)
    read = ExpertReader.expert

    def meanwhile(self, layer, expert):
        if expert == 7:
            fine_tune(model)
        return read(self, layer, expert)

    monkeypatch.setattr(ExpertReader, "expert", meanwhile)
    with pytest.raises(ValueError, match="was written to while it was packed"):
        pack(model, path)
    with pytest.raises(ValueError, match="is not finished"):
        Sidecar.open(path)


def test_one_packer_at_a_time(folders, monkeypatch):
    model, path = folders
    whole = contents(path)
    shutil.rmtree(path)
    second = []

    def pack_meanwhile(self, number, bar, first=_Packer._pack_layer):
        with pytest.raises(ValueError, match="another process is packing into"):
            pack(model, path)
        second.append(number)
        return first(self, number, bar)

    monkeypatch.setattr(_Packer, "_pack_layer", pack_meanwhile)
    pack(model, path)
    assert second == [1, 2, 3, 4]
    assert contents(path) == whole


def test_packers_without_locks_do_not_disturb_each_other(folders, monkeypatch):
    """Some network disks have no locks; there both packers end with the right files."""
    model, path = folders
    whole = contents(path)
    shutil.rmtree(path)

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "no locks")

    def pack_meanwhile(self, number, bar, first=_Packer._pack_layer):
        stream = type(self)._stream

        def interrupted(self, *rest):
            monkeypatch.setattr(_Packer, "_stream", stream)
            monkeypatch.setattr(_Packer, "_pack_layer", first)
            pack(model, path)
            return stream(self, *rest)

        if number == 2:
            monkeypatch.setattr(_Packer, "_stream", interrupted)
        return first(self, number, bar)

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(_Packer, "_pack_layer", pack_meanwhile)
    pack(model, path)
    assert contents(path) == whole


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
        (["--trace", "x"], "--trace: needs --memory-budget, --slots or --sidecar"),
        (
            ["--slots", "3", "--context", "5"],
            "exceed the context of 5 tokens, for which memory was planned",
        ),
        (["--slots", "3", "--read-split", "5kB"], "whole 4096-byte blocks"),
        (["--sidecar", "nowhere"], "nowhere has no manifest.json"),
        (["--slots", "3", "--pins", "none.json"], "--pins and --policy pinned need one another"),
        (
            ["--slots", "3", "--policy", "pinned", "--pins", "none.json"],
            "none.json: no such file",
        ),
    ],
)
def test_generate_refuses(folders, capsys, more, message):
    model, _ = folders
    assert main(generate_command(model, *more)) == 2
    assert message in capsys.readouterr().err
