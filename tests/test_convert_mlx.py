"""Folders in MLX's formats that convert writes, by mlx-lm's own convert."""

import json

import mlx.core as mx
import pytest
from conftest import tiny_config, write_checkpoint
from test_generate import write_tokenizer
from test_streaming import AFFINE, run, same

from glm_fused.checkpoint.description import describe
from glm_fused.cli import main
from glm_fused.loader import load_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "model", layout="hf")
    write_tokenizer(folder)
    return folder


def formats(folder):
    """The formats of each kind of weights."""
    return {name: kind["formats"] for name, kind in describe(folder)["formats"].items()}


EXPERTS = {"experts gate", "experts up", "experts down"}
KEPT = {"norms", "router", "indexer"}


@pytest.mark.parametrize(
    ("experts", "dense"),
    [("mxfp4", "affine8-g32"), ("affine4", "mxfp8"), ("nvfp4", None), (None, "affine6"),
     ("affine3-g128", None), (None, None)],
)  # fmt: skip
def test_types(source, tmp_path, experts, dense, capsys):
    out = tmp_path / "out"
    given = {"--experts": experts, "--dense": dense}
    more = [word for flag, name in given.items() if name for word in (flag, name)]
    assert main(["convert", "--model", str(source), str(out), *more, "--json"]) == 0
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    told = {"path": str(out), "files": len(list(out.iterdir())), "bytes": nbytes}
    assert json.loads(capsys.readouterr().out) == told
    found = formats(out)
    for name, kinds in found.items():
        wanted = None if name in KEPT else experts if name in EXPERTS else dense
        assert kinds == [wanted or "bf16"], name
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    if not more:
        assert same(run(load_model(out)[0]), run(load_model(source)[0]))


def test_values_are_those_of_mx_quantize(source, tmp_path):
    out = tmp_path / "out"
    assert main(["convert", "--model", str(source), str(out), "--experts", "mxfp4"]) == 0
    name = "model.layers.2.mlp.switch_mlp.up_proj"
    theirs = mx.load(str(source / "model.safetensors"))
    stack = [theirs[f"model.layers.2.mlp.experts.{e}.up_proj.weight"] for e in range(8)]
    expected = mx.quantize(mx.stack(stack), group_size=32, bits=4, mode="mxfp4")
    mine = mx.load(str(out / "model.safetensors"))
    for part, array in zip(("weight", "scales"), expected, strict=True):
        assert mx.array_equal(mine[f"{name}.{part}"], array).item()


def refused(capsys, model, out, *more):
    assert main(["convert", "--model", str(model), str(out), *more]) == 2
    assert not list(out.parent.glob("*.tmp"))
    return capsys.readouterr().err


def test_what_does_not_fit_is_refused(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert "expected one of affine2-g32," in refused(capsys, source, out, "--experts", "q4_0")
    assert "--overwrite is for a .gguf file" in refused(capsys, source, out, "--overwrite")
    error = refused(capsys, source, out, "--shard-size", "1GB")
    assert "--shard-size is for a .gguf file" in error
    assert "lie in one another" in refused(capsys, source, source / "out")
    assert "lie in one another" in refused(capsys, source, source.parent)
    packed = write_checkpoint(tmp_path / "packed", quantization=AFFINE)
    error = refused(capsys, packed, out, "--experts", "mxfp4")
    assert f"{packed} is quantized already (affine4-g32), expected floats" in error
    odd = write_checkpoint(tmp_path / "odd", tiny_config(moe_intermediate_size=96))
    error = refused(capsys, odd, out, "--experts", "affine4")
    assert "down_proj.weight has rows of 96, expected a multiple of 64 for affine4" in error
    assert f"the tokenizer in {odd} does not load" in refused(capsys, odd, out)
    assert not out.exists()


def test_a_folder_that_holds_something_is_left_alone(source, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert f"{tmp_path} is not empty" in refused(capsys, source, tmp_path)
    assert f"{tmp_path / 'mine'} is a file" in refused(capsys, source, tmp_path / "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_failure_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    from mlx_lm import utils

    def full(*_, **__):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(utils, "save_config", full)
    assert "No space left" in refused(capsys, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
