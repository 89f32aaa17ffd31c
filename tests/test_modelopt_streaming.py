"""Streamed NVFP4 experts of modelopt: a factor of four bytes is a part of its own."""

import json
import os

import modelopt_checkpoints as modelopt
import pytest
from conftest import write_checkpoint
from modelopt_checkpoints import checkpoint_tensors, config_of
from test_streaming import run, same, stream

from glm_fused import reference_path
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.cli import main
from glm_fused.loader import load_model
from glm_fused.ops import metal_sim
from glm_fused.streaming.pack import pack
from glm_fused.streaming.sidecar import Sidecar

LAYER = 3
FACTOR = f"model.layers.{LAYER}.mlp.experts.5.up_proj.weight_scale_2"
PARTS = [("weight", "U32", (128, 16)), ("scales", "U8", (128, 8)), ("global_scale", "F32", ())]


def write(directory, scalar=()):
    tensors, _ = checkpoint_tensors(config_of(), modelopt.every_linear, "bfloat16", scalar)
    return write_checkpoint(directory, config_of(), edit=lambda _: tensors, shards=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("modelopt"))


@pytest.fixture(scope="module")
def sidecar(folder):
    pack(folder, folder / "sidecar")
    return folder / "sidecar"


@pytest.fixture(scope="module")
def resident(folder):
    return run(load_model(folder)[0])


@pytest.mark.parametrize("packed", [False, True], ids=["shards", "sidecar"])
@pytest.mark.parametrize("slots", [2, 3, 8])
@pytest.mark.parametrize("direct", [False, True])
def test_bits_are_those_of_the_resident_model(folder, sidecar, resident, slots, packed, direct):
    options = stream(slots, sidecar=sidecar if packed else None, direct=direct)
    model, _ = load_model(folder, stream=options)
    assert same(run(model), resident)
    stats, nbytes = model.streaming.stats(), 3 * (128 * 16 * 4 + 128 * 8 + 4)
    assert stats["bytes"] == stats["misses"] * nbytes
    assert {layer.expert_bytes for layer in model.streaming.plan.layers} == {nbytes}


@pytest.mark.slow
@pytest.mark.skipif(bool(metal_sim.unavailable()), reason=metal_sim.unavailable())
def test_the_metal_kernels_take_the_slots(folder, resident):
    model, _ = load_model(folder, stream=stream(4))
    with metal_sim.simulated():
        assert same(run(model, steps=2), resident[:4])


def test_the_reference_path_streams_too(folder, resident):
    with reference_path():
        assert same(run(load_model(folder, stream=stream(2))[0]), resident)


def test_numbers_stored_as_lists_of_one(tmp_path, resident):
    path = write(tmp_path / "model", scalar=(1,))
    pack(path, tmp_path / "sidecar")
    for source in (None, tmp_path / "sidecar"):
        assert same(run(load_model(path, stream=stream(sidecar=source))[0]), resident)


def test_the_manifest_names_planes(sidecar):
    for layer in Sidecar.open(sidecar).layers:
        names = [f"{p}.{part[0]}" for p in ("gate_proj", "up_proj", "down_proj") for part in PARTS]
        assert [part.name for part in layer.parts] == names
        assert [tuple(part)[1:] for part in layer.parts[3:6]] == [part[1:] for part in PARTS]


@pytest.fixture
def copy(tmp_path):
    """A checkpoint of its own with its sidecar, to be changed."""
    path = write(tmp_path / "model")
    pack(path, tmp_path / "sidecar")
    return path, tmp_path / "sidecar"


def change_factor(path, keep_times=False):
    info = Checkpoint.open(path).tensors[FACTOR]
    file = path / info.file
    times = file.stat()
    with file.open("r+b") as f:
        f.seek(info.start)
        byte = f.read(1)[0]
        f.seek(info.start)
        f.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_another_factor_is_noticed(copy, capsys):
    path, sidecar = copy
    assert main(["sidecar", "verify", "--model", str(path), str(sidecar)]) == 0
    change_factor(path)
    with pytest.raises(ValueError, match=r"was packed before '.*' was written or copied"):
        load_model(path, stream=stream(sidecar=sidecar))
    with pytest.raises(ValueError, match=rf"layer {LAYER}, expert 5 was another when it was"):
        pack(path, sidecar)


def test_another_factor_that_hides_is_found_by_verify(copy, capsys):
    path, sidecar = copy
    change_factor(path, keep_times=True)
    assert main(["sidecar", "verify", "--model", str(path), str(sidecar)]) == 1
    assert f"layer_00{LAYER}.bin" in capsys.readouterr().out


def test_a_damaged_factor_is_never_used(copy):
    path, sidecar = copy
    layer = Sidecar.open(sidecar).layers[LAYER - 1]
    at = 16384 + 5 * layer.slab + sum(part.nbytes for part in layer.parts[:5])
    with (sidecar / layer.file).open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))
    model, _ = load_model(path, stream=stream(8, sidecar=sidecar))
    with pytest.raises(RuntimeError, match=rf"layer {LAYER}.*expert 5"):
        run(model, steps=30)


MISTAKES = {
    "shape": lambda parts: parts[2][2].append(1),
    "type": lambda parts: parts[2].__setitem__(1, "U32"),
    "place": lambda parts: parts.__setitem__(slice(1, 3), parts[2:0:-1]),
    "name": lambda parts: parts[2].__setitem__(0, "up_proj.global_scale"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_manifest_that_mistakes_a_factor_is_refused(copy, mistake):
    path, sidecar = copy
    manifest = json.loads((sidecar / "manifest.json").read_text())
    MISTAKES[mistake](manifest["layers"][0]["parts"])
    (sidecar / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"layer 1 has .* where .* has "):
        load_model(path, stream=stream(sidecar=sidecar))
