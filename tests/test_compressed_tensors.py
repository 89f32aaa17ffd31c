"""Checkpoints of compressed-tensors give the logits of the numbers that they stand for."""

import json
import random
import re
import sys

import integer_checkpoints as made
import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config
from integer_checkpoints import quantization_config, scheme
from mlx.utils import tree_flatten
from test_generate import write_tokenizer

from glm_fused.checkpoint.compressed_tensors import parse
from glm_fused.checkpoint.description import describe
from glm_fused.loader import load_model
from glm_fused.mlx_lm import __main__ as mlx_lm_tools
from glm_fused.streaming.options import StreamOptions

TOKENS = mx.array([np.random.default_rng(1).integers(0, 256, 40).tolist()])
Q_A = "model.layers.1.self_attn.q_a_proj"
KV_B = "model.layers.2.self_attn.kv_b_proj"
EXPERT = "model.layers.1.mlp.experts.7.up_proj"
KEPT = re.compile(r"lm_head|.*weights_proj")
MIX = {
    "group_0": scheme(4, 128, ["re:.*mlp.experts.*"]),
    "group_1": scheme(8, 64, ["Linear"]),
    "group_2": scheme(8, 32, [EXPERT.replace("experts.7.up_proj", "shared_experts.up_proj")]),
}


def uniform(bits, group_size):
    return lambda path: None if KEPT.fullmatch(path) else (bits, group_size)


def mixed(path):
    if KEPT.fullmatch(path):
        return None
    if path in MIX["group_2"]["targets"]:
        return 8, 32
    return (4, 128) if ".mlp.experts." in path else (8, 64)


def config_of(**changes):
    return tiny_config(quantization_config=quantization_config(**changes))


def write(directory, form_of=uniform(4, 64), dtype="float32", edit=None, **changes):  # noqa: B008
    config = config_of(**changes)
    stored, _ = made.checkpoint_tensors(config, form_of, dtype)
    return made.write(directory, config, stored, edit)


CASES = {
    "int4 g64": (uniform(4, 64), {"group_0": scheme(4, 64)}),
    "int4 g128": (uniform(4, 128), {"group_0": scheme(4, 128)}),
    "int8 g64": (uniform(8, 64), {"group_0": scheme(8, 64)}),
    "int8 g128": (uniform(8, 128), {"group_0": scheme(8, 128)}),
    "int4 experts, int8 elsewhere": (mixed, MIX),
}


def logits(path):
    return np.array(load_model(path)[0](TOKENS).astype(mx.float32))


@pytest.mark.parametrize(("form_of", "groups"), CASES.values(), ids=CASES)
def test_logits_of_the_dequantized_weights(tmp_path, form_of, groups):
    config = config_of(groups=groups)
    stored, values = made.checkpoint_tensors(config, form_of)
    found = logits(made.write(tmp_path / "packed", config, stored))
    expected = logits(made.write_dense(tmp_path / "dense", values))
    spread = expected.max() - expected.min()
    assert np.abs(found - expected).max() <= 1e-5 * spread


def test_words_are_loaded_as_they_lie(tmp_path):
    stored, _ = made.checkpoint_tensors(config_of(), uniform(4, 64), "bfloat16")
    model, _ = load_model(made.write(tmp_path, config_of(), stored))
    layer = model.layers[1].self_attn.q_a_proj
    assert (layer.bits, layer.group_size, layer.mode) == (4, 64, "affine")
    words = np.array(layer.weight)
    assert words.tobytes() == stored[f"{Q_A}.weight_packed"][2]
    assert mx.array_equal(layer.scales, stored[f"{Q_A}.weight_scale"])
    assert mx.array_equal(layer.biases, -8 * layer.scales)


def test_unused_tensors_are_packed_too(tmp_path):
    """They are MTP's layer and the indexers that some quantizers keep on shared layers."""
    config = config_of()
    expected = logits(write(tmp_path / "without"))
    stored, _ = made.checkpoint_tensors(config, uniform(4, 64), mtp=True, shared_indexers=True)
    path = made.write(tmp_path / "with", config, stored)
    assert np.array_equal(logits(path), expected)
    found = describe(path)
    assert set(found["ignored_tensors"]) == {"MTP layer", "indexer of a shared layer"}
    assert found["mtp_layers"][0]["missing"] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_embed_q_is_not_quantized_again(tmp_path, dtype):
    config = config_of()
    stored, values = made.checkpoint_tensors(config, uniform(4, 64), dtype)
    attention = load_model(made.write(tmp_path, config, stored))[0].layers[2].self_attn
    assert "scales" not in attention.embed_q
    assert attention.embed_q.weight.dtype == getattr(mx, dtype)
    expected = mx.array(values[f"{KV_B}.weight"].reshape(4, 128, 128)).astype(getattr(mx, dtype))
    assert mx.array_equal(attention.embed_q.weight, expected[:, :64].swapaxes(1, 2))
    rows = attention.unembed_out
    codes = mx.dequantize(
        rows.weight, rows.scales.astype(mx.float32), rows.biases.astype(mx.float32), 64, 4
    )
    np.testing.assert_allclose(
        np.array(codes), values[f"{KV_B}.weight"].reshape(4, 128, 128)[:, 64:], atol=1e-7
    )


def put(name, change):
    def edit(stored):
        stored[name] = change(stored[name])

    return edit


def drop(name):
    return lambda stored: stored.pop(name)


def add(name):
    return lambda stored: stored.update({name: mx.zeros((1,))})


def shape(rows, columns):
    return lambda old: ("I64", (2,), np.array([rows, columns], "<i8").tobytes())


def spoiled(scales):
    values = np.array(scales)
    values[1, 1] = np.nan
    return mx.array(values)


DAMAGES = {
    "missing scale": (drop(f"{Q_A}.weight_scale"), rf"1 missing tensor: {Q_A}\.weight_scale"),
    "missing shape": (drop(f"{Q_A}.weight_shape"), rf"1 missing tensor: {Q_A}\.weight_shape"),
    "missing words": (drop(f"{Q_A}.weight_packed"), rf"1 missing tensor: {Q_A}\.weight_packed"),
    "missing expert": (
        lambda stored: [stored.pop(f"{EXPERT}.weight_{p}") for p in ("packed", "scale", "shape")],
        rf"1 missing tensor: {EXPERT}\.weight",
    ),
    "words of another type": (
        put(f"{Q_A}.weight_packed", lambda t: ("U8", (128, 64), t[2])),
        rf"{Q_A}\.weight_packed \(model\.safetensors\) is U8 .*, expected I32 \[128, 16\]",
    ),
    "scales of another group": (
        put(f"{EXPERT}.weight_scale", lambda s: s[:, :1]),
        rf"{EXPERT}\.weight_scale .* is F32 \[128, 1\], expected .* \[128, 2\] \(affine4 in",
    ),
    "another shape": (
        put(f"{Q_A}.weight_shape", shape(128, 127)),
        rf"{Q_A}\.weight_shape \(model\.safetensors\) is \[128, 127\], expected \[128, 128\]",
    ),
    "NaN": (put(f"{Q_A}.weight_scale", spoiled), rf"{Q_A}\.weight_scale has nan at \[1, 1\]"),
    "NaN in an expert": (
        put(f"{EXPERT}.weight_scale", spoiled),
        rf"{EXPERT}\.weight_scale has nan at \[1, 1\]",
    ),
    "NaN in kv_b": (put(f"{KV_B}.weight_scale", spoiled), r"kv_b_proj\.weight_scale has nan at"),
    "zero points": (add(f"{Q_A}.weight_zero_point"), rf"unexpected tensor: {Q_A}\.weight_zero_p"),
    "order of columns": (add(f"{Q_A}.weight_g_idx"), rf"unexpected tensor: {Q_A}\.weight_g_idx"),
    "twice": (add(f"{Q_A}.weight"), rf"{Q_A}\.weight .* is F32 \[1\], expected"),
}


@pytest.mark.parametrize(("edit", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path, edit=edit))


def test_config_that_contradicts_the_tensors(tmp_path):
    path = write(tmp_path / "ignored", ignore=["lm_head", "re:.*weights_proj", Q_A])
    with pytest.raises(ValueError, match=rf"{Q_A}\.weight_packed is quantized, but config\.json"):
        load_model(path)
    path = write(tmp_path / "bits", groups={"group_0": scheme(8, 64)})
    with pytest.raises(ValueError, match=r"weight_packed .* expected I32 \[.*\(affine8 in"):
        load_model(path)
    path = write(
        tmp_path / "named", groups={"a": scheme(), "b": scheme(8, 64, ["lm_head"])}, ignore=[]
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight has no scales, but .* affine8"):
        load_model(path)
    path = write(tmp_path / "no config")
    (path / "config.json").write_text((path / "config.json").read_text().replace("_method", "_m"))
    with pytest.raises(ValueError, match=r"weight_packed is quantized, but config\.json does not"):
        load_model(path)


def test_modules_left_as_they_are_need_no_entry(tmp_path):
    """``Linear`` names all matrices, yet some of them are stored as they were."""
    model, _ = load_model(write(tmp_path, ignore=[]))
    assert "scales" not in model.lm_head


CONFIGS = {
    "float": (scheme(type="float"), r"weights\.type is 'float', expected 'int'"),
    "three bits": (scheme(3), r"weights\.num_bits is 3, expected 4 or 8"),
    "asymmetric": (scheme(symmetric=False), r"weights\.symmetric is False, expected True"),
    "channels": (scheme(group_size=None, strategy="channel"), r"strategy is 'channel', expected"),
    "group": (scheme(group_size=48), r"weights: group_size 48, expected 32 or 64 or 128"),
    "no group": (scheme(group_size=None), r"weights: group_size None, expected 32, 64 or 128"),
    "order": (scheme(actorder="group"), r"weights\.actorder is 'group', expected None or False"),
    "format": (scheme() | {"format": "nvfp4-pack-quantized"}, r"format is 'nvfp4-pack-quantized'"),
    "targets": (scheme() | {"targets": "Linear"}, r"targets must be a list of strings"),
    "expression": (scheme(targets=["re:("]), r"targets: 're:\(' is no regular expression"),
    "weights": (scheme() | {"weights": 4}, r"weights must be an object, found 4"),
    "no object": (["Linear"], r"config_groups\['group_0'\] must be an object, found"),
}


@pytest.mark.parametrize(("group", "message"), CONFIGS.values(), ids=CONFIGS)
def test_impossible_groups(group, message):
    with pytest.raises(ValueError, match=message) as error:
        parse("quantization_config", quantization_config(groups={"group_0": group}))
    assert "quantization_config" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "float-quantized"}, "format is 'float-quantized', expected 'pack-quantized'"),
        ({"format": None}, "format is None"),
        ({"sparsity_config": {"format": "sparse-24"}}, "sparsity_config .* expected none"),
        ({"transform_config": {"config_groups": {}}}, "transform_config .* expected none"),
        ({"config_groups": {}}, "config_groups {}, expected an object"),
        ({"ignore": [1]}, "ignore must be a list of strings"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        parse("quantization_config", quantization_config(**changes))


def _garbage(rng, depth=0):
    plain = [
        None,
        True,
        0,
        4,
        -1,
        10**400,
        0.5,
        float("nan"),
        "",
        "re:(",
        "re:.*",
        "Linear",
        [],
        {},
    ]
    if depth < 2 and rng.random() < 0.3:
        return [_garbage(rng, depth + 1) for _ in range(rng.randrange(3))]
    return rng.choice(plain)


def test_mutated_configs_parse_or_raise_value_error():
    rng, parsed = random.Random(5), 0
    for _ in range(3000):
        config = json.loads(json.dumps(quantization_config(groups=MIX)))
        group = rng.choice(list(config["config_groups"].values()))
        place = rng.choice([config, group, group["weights"], config["config_groups"]])
        place[rng.choice(sorted(place))] = _garbage(rng)
        try:
            found = parse("quantization_config", config)
        except ValueError as error:
            assert str(error).startswith("[config] ")
            assert len(str(error)) < 400
        else:
            parsed += 1
            assert len(found.declared(EXPERT)) == 2
    assert 0 < parsed < 3000


def test_the_closest_target_counts():
    groups = {
        "a": scheme(8, 32, ["Linear"]),
        "b": scheme(4, 64, [r"re:.*\.experts\..*"]),
        "c": scheme(4, 128, ["model.x.experts.0"]),
        "d": scheme(8, 128, ["Embedding"]) | {"weights": None},
    }
    found = parse("q", quantization_config(groups=groups, ignore=["re:.*gate$"])).declared
    assert [str(found(path)[0]) for path in ("lm_head", "model.x.experts.1")] == [
        "affine8-g32",
        "affine4",
    ]
    assert found("model.x.experts.0")[1] and str(found("model.x.experts.0")[0]) == "affine4-g128"
    assert found("model.x.experts.gate") == found("model.embed_tokens") == (None, False)


def test_report_counts_what_is_stored_and_loaded(tmp_path):
    path = write(tmp_path, mixed, "bfloat16", groups=MIX)
    found = describe(path)
    assert found["formats"]["experts up"]["formats"] == ["affine4-g128"]
    assert found["formats"]["attention"]["formats"] == ["affine8"]
    assert found["formats"]["head"]["formats"] == ["bf16"]
    model, _ = load_model(path)
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert found["bytes_loaded"] == total


def test_converted_checkpoint_streams_with_the_same_bits(tmp_path, monkeypatch):
    source, target = write(tmp_path / "source", mixed, "bfloat16", groups=MIX), tmp_path / "target"
    write_tokenizer(source)
    arguments = ["x", "convert", "--hf-path", str(source), "--mlx-path", str(target)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert mlx_lm_tools.main() == 0
    config = json.loads((target / "config.json").read_text())
    assert {key: config["quantization"][key] for key in ("bits", "group_size")} == {
        "bits": 8,
        "group_size": 64,
    }
    expected = logits(source)
    assert np.array_equal(logits(target), expected)
    streamed, _ = load_model(target, stream=StreamOptions(slots=4))
    assert np.array_equal(np.array(streamed(TOKENS).astype(mx.float32)), expected)


def test_streaming_is_refused(tmp_path):
    path = write(tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp has experts of compressed-tensors"
    ):
        load_model(path, stream=StreamOptions(slots=4))
