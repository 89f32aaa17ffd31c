"""FP8 checkpoints: experts stay as on disk, resident and streamed; the rest becomes bfloat16."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import make_tensors, tiny_config, write_checkpoint, write_safetensors
from formats_under_test import E4M3
from mlx.utils import tree_flatten
from test_streaming import run, same, stream

from glm_fused import reference_path
from glm_fused.checkpoint.description import describe
from glm_fused.engine import Engine
from glm_fused.formats.weights import FP8
from glm_fused.loader import load_model
from glm_fused.ops import metal_sim
from glm_fused.streaming.pack import pack

TOKENS = mx.array([np.random.default_rng(1).integers(0, 256, 40).tolist()])
EXPERT = "model.layers.2.mlp.experts.5.up_proj"
# Two squares of scales an expert, one beside or one above the other.
WIDE = {"hidden_size": 256, "moe_intermediate_size": 128}


def logits(path):
    return np.array(load_model(path)[0](TOKENS).astype(mx.float32))


def write_values(directory, config, tensors):
    """The values that NumPy makes of codes and scales; those that are no expert's, as bfloat16."""
    dense = {}
    for name, stored in tensors.items():
        if isinstance(stored, tuple):
            _, (m, n), codes = stored
            values = E4M3[np.frombuffer(codes, np.uint8).reshape(m, n)].astype(np.float32)
            scale = np.array(tensors[f"{name}_scale_inv"]).repeat(128, 0)[:m].repeat(128, 1)
            dense[name] = mx.array(values * scale[:, :n])
            if ".experts." not in name:
                dense[name] = dense[name].astype(mx.bfloat16).astype(mx.float32)
        elif not name.endswith("_scale_inv"):
            dense[name] = stored
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", dense)
    return directory


def assert_near(found, expected):
    assert np.abs(found - expected).max() <= 1e-5 * (expected.max() - expected.min())


@pytest.mark.parametrize("sizes", [{}, WIDE], ids=["tiny", "wide"])
def test_logits_of_the_values(tmp_path, sizes):
    config = tiny_config(**sizes)
    path = write_checkpoint(tmp_path / "fp8", config, layout="fp8", dtype="float32")
    found = logits(path)
    tensors = make_tensors(config, "fp8", dtype="float32")
    expected = logits(write_values(tmp_path / "dense", config, tensors))
    assert_near(found, expected)
    with reference_path():
        assert np.array_equal(logits(path), found)

    def spoiled(tensors):
        tensors[f"{EXPERT}.weight_scale_inv"] = tensors[f"{EXPERT}.weight_scale_inv"] * 2

    other = write_checkpoint(
        tmp_path / "other", config, layout="fp8", dtype="float32", edit=spoiled
    )
    with pytest.raises(AssertionError):
        assert_near(logits(other), expected)


def test_experts_are_as_large_as_on_disk(tmp_path):
    path = write_checkpoint(tmp_path, tiny_config(**WIDE), layout="fp8")
    model, _ = load_model(path)
    experts, tensors = model.layers[2].mlp.switch_mlp, make_tensors(tiny_config(**WIDE), "fp8")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        layer = experts[projection]
        assert layer.format == FP8
        stored = [tensors[f"{EXPERT[:-7]}{projection}.weight{part}"] for part in ("", "_scale_inv")]
        assert np.array(layer.weight[5]).tobytes() == stored[0][2]
        assert np.array_equal(np.array(layer.scales[5]), np.array(stored[1]))
    found = describe(path)
    kinds = [found["formats"][f"experts {name}"] for name in ("gate", "up", "down")]
    assert all(kind["formats"] == ["fp8"] for kind in kinds)
    assert sum(
        array.nbytes
        for layer in model.layers[1:]
        for _, array in tree_flatten(layer.mlp.switch_mlp.parameters())
    ) == sum(kind["bytes"] for kind in kinds)
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert total == found["bytes_loaded"]


def test_columns_that_squares_do_not_fill_become_bfloat16(tmp_path):
    config = tiny_config(moe_intermediate_size=96)
    model, _ = load_model(write_checkpoint(tmp_path, config, layout="fp8"))
    experts = model.layers[2].mlp.switch_mlp
    assert experts.up_proj.format == FP8 and experts.down_proj.weight.dtype == mx.bfloat16
    with pytest.raises(ValueError, match=r"FP8 experts of 96 columns, expected a multiple of 128"):
        load_model(tmp_path, stream=stream())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp8")
    return write_checkpoint(path, tiny_config(**WIDE), layout="fp8", shards=3)


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
def test_streamed_bits_are_those_of_the_resident_model(
    folder, sidecar, resident, slots, packed, direct
):
    options = stream(slots, sidecar=sidecar if packed else None, direct=direct)
    model, _ = load_model(folder, stream=options)
    assert same(run(model), resident)
    stats, nbytes = model.streaming.stats(), 3 * (128 * 256 + 4 * 2)
    assert stats["bytes"] == stats["misses"] * nbytes > 0


@pytest.mark.slow
@pytest.mark.skipif(bool(metal_sim.unavailable()), reason=metal_sim.unavailable())
def test_the_metal_kernels_take_the_slots(folder, resident):
    model, _ = load_model(folder, stream=stream(4))
    with metal_sim.simulated():
        assert same(run(model, steps=2), resident[:4])


def test_the_reference_path_streams_too(folder, resident):
    with reference_path():
        assert same(run(load_model(folder, stream=stream(2))[0]), resident)


def test_mlx_is_given_bfloat16(tmp_path, folder):
    """Tools that read weights themselves get values, and a config that says so."""
    engine = Engine(folder, tokenizer=False, only_mlx_formats=True)
    assert "quantization_config" not in engine.config and "quantization" not in engine.config
    found = engine.model.layers[2].mlp.switch_mlp.up_proj
    tensors = make_tensors(tiny_config(**WIDE), "fp8")
    path = write_values(tmp_path / "dense", tiny_config(**WIDE), tensors)
    expected = load_model(path)[0].layers[2].mlp.switch_mlp.up_proj.weight
    assert mx.array_equal(found.weight, expected.astype(mx.bfloat16))
    with pytest.raises(ValueError, match="quantization mode"):
        layer = load_model(folder)[0].layers[2].mlp.switch_mlp.up_proj
        mx.dequantize(layer.weight, layer.scales, None, layer.group_size, layer.bits, layer.mode)


def drop(name):
    def edit(tensors):
        del tensors[name]

    return edit


def put(name, value):
    def edit(tensors):
        tensors[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{EXPERT}.weight_scale_inv"), rf"missing .*{EXPERT}\.weight_scale_inv"),
        (
            put(f"{EXPERT}.weight_scale_inv", mx.ones((2, 2))),
            rf"{EXPERT}\.weight_scale_inv .* is F32 \[2, 2\], expected .* \[1, 2\]",
        ),
        (
            put(f"{EXPERT}.weight_scale_inv", mx.ones((1, 2), mx.int32)),
            rf"{EXPERT}\.weight_scale_inv .* is I32 \[1, 2\], expected BF16 or F16 or F32",
        ),
        (
            put(f"{EXPERT}.weight_scale_inv", mx.array([[1.0, -1.0]])),
            rf"{EXPERT}\.weight_scale_inv has -1\.0 at \[0, 1\], expected positive finite",
        ),
        (
            put(f"{EXPERT}.weight", mx.ones((128, 256), mx.bfloat16)),
            rf"unexpected .*{EXPERT}\.weight_scale_inv",
        ),
    ],
)
def test_damage_is_named(tmp_path, edit, message):
    path = write_checkpoint(tmp_path, tiny_config(**WIDE), layout="fp8", edit=edit)
    with pytest.raises(ValueError, match=message):
        load_model(path)
