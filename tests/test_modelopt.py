"""NVFP4 checkpoints of modelopt give the logits of the numbers that they stand for."""

import json
import sys

import integer_checkpoints as made
import mlx.core as mx
import modelopt_checkpoints as modelopt
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from mlx.utils import tree_flatten
from modelopt_checkpoints import config_of, declare_beside, every_linear
from test_generate import write_tokenizer

from glm_fused import Engine, reference_path
from glm_fused.checkpoint.description import describe
from glm_fused.checkpoint.modelopt import parse
from glm_fused.loader import load_model
from glm_fused.mlx_lm import __main__ as mlx_lm_tools

TOKENS = mx.array([np.random.default_rng(1).integers(0, 256, 40).tolist()])
EXPERT = "model.layers.1.mlp.experts.7.up_proj"
DOWN = "model.layers.2.mlp.experts.3.down_proj"
KV_B = "model.layers.2.self_attn.kv_b_proj"


def embedding(path):
    return path == "model.embed_tokens"


PACKED = {"experts": modelopt.EXPERTS.fullmatch, "every": every_linear, "embedding": embedding}


def write(directory, packs=PACKED["experts"], dtype="float32", edit=None, **options):
    """A checkpoint with its declaration in config.json."""
    config = config_of()
    stored, _ = modelopt.checkpoint_tensors(config, packs, dtype, **options)
    return made.write(directory, config, stored, edit)


def write_values(directory, values, packs):
    """The same weights, dequantized; what becomes bfloat16 when it is loaded is so here."""

    def rounded(array):
        return np.array(mx.array(array).astype(mx.bfloat16).astype(mx.float32))

    for name, array in values.items():
        if packs(name.removesuffix(".weight")) and "kv_b_proj" in name:
            heads = array.reshape(4, 128, 128)
            heads[:, :64] = rounded(heads[:, :64])
        elif packs(name.removesuffix(".weight")) and "embed_tokens" in name:
            values[name] = rounded(array)
    return made.write_dense(directory, values)


def logits(path):
    return np.array(load_model(path)[0](TOKENS).astype(mx.float32))


def assert_near(found, expected):
    spread = expected.max() - expected.min()
    assert np.abs(found - expected).max() <= 1e-5 * spread


@pytest.mark.parametrize("beside", [False, True], ids=["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("packs", PACKED.values(), ids=PACKED)
def test_logits_of_the_dequantized_weights(tmp_path, packs, beside):
    config, scalar = config_of(beside), (1,) if beside else ()
    stored, values = modelopt.checkpoint_tensors(config, packs, scalar=scalar)
    path = made.write(tmp_path / "packed", config, stored)
    if beside:
        declare_beside(path)
    found = logits(path)
    assert_near(found, logits(write_values(tmp_path / "dense", values, packs)))
    with reference_path():
        assert np.array_equal(logits(path), found)


def test_a_lost_factor_is_noticed(tmp_path):
    """The comparison above is none if it does not see that an expert's factor is another."""
    stored, values = modelopt.checkpoint_tensors(config_of())
    stored[f"{DOWN}.weight_scale_2"] = mx.array(1.0)
    found = logits(made.write(tmp_path / "packed", config_of(), stored))
    with pytest.raises(AssertionError):
        assert_near(found, logits(write_values(tmp_path / "dense", values, PACKED["experts"])))


def test_bytes_are_loaded_as_they_lie(tmp_path):
    stored, _ = modelopt.checkpoint_tensors(config_of(), every_linear, "bfloat16")
    model, _ = load_model(made.write(tmp_path, config_of(), stored))
    layer, experts = model.layers[1].self_attn.q_a_proj, model.layers[1].mlp.switch_mlp.up_proj
    assert str(layer.format) == str(experts.format) == "nvfp4-global"
    assert np.array(experts.weight[7]).tobytes() == stored[f"{EXPERT}.weight"][2]
    assert np.array(experts.scales[7]).tobytes() == stored[f"{EXPERT}.weight_scale"][2]
    assert np.array(experts.global_scale[7]).tobytes() == stored[f"{EXPERT}.weight_scale_2"][2]
    q_a = "model.layers.1.self_attn.q_a_proj"
    assert layer.global_scale.shape == ()
    assert np.array(layer.weight).tobytes() == stored[f"{q_a}.weight"][2]
    attention = model.layers[2].self_attn
    assert "scales" not in attention.embed_q and attention.embed_q.weight.dtype == mx.bfloat16
    factor = np.frombuffer(stored[f"{KV_B}.weight_scale_2"][2], np.float32)
    assert np.array_equal(attention.unembed_out.global_scale, factor.repeat(4))


def test_unused_tensors(tmp_path):
    """MTP's layer, indexers of shared layers, scales of activations and of a quantized cache."""

    def with_cache_scales(stored):
        for layer in range(5):
            for name in ("k_proj.k_scale", "v_proj.v_scale"):
                stored[f"model.layers.{layer}.self_attn.{name}"] = mx.array(1.0)

    def without_input_scales(stored):
        for name in [name for name in stored if name.endswith(".input_scale")]:
            del stored[name]

    expected = logits(write(tmp_path / "without", edit=without_input_scales))
    options = {"mtp": True, "shared_indexers": True}
    path = write(tmp_path / "with", edit=with_cache_scales, **options)
    assert np.array_equal(logits(path), expected)
    found = describe(path)
    assert found["ignored_tensors"].pop("scales of a quantized cache") == 10
    assert set(found["ignored_tensors"]) == {"MTP layer", "indexer of a shared layer"}
    assert found["mtp_layers"][0]["missing"] == []


@pytest.mark.parametrize("packs", PACKED.values(), ids=PACKED)
def test_report_counts_what_is_stored_and_loaded(tmp_path, packs):
    path = write(tmp_path, packs, "bfloat16")
    found = describe(path)
    kinds = {name: kind["formats"] for name, kind in found["formats"].items()}
    packed = {name for name, formats in kinds.items() if formats == ["nvfp4-global"]}
    assert {"experts up", "experts down"} <= packed or packed == {"embedding"}
    assert kinds["norms"] == kinds["router"] == ["bf16"]
    assert sum(kind["bytes"] for kind in found["formats"].values()) == sum(
        array.nbytes for array in mx.load(str(path / "model.safetensors")).values()
    )
    model, _ = load_model(path)
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert found["bytes_loaded"] == total


def put(name, *stored):
    return lambda tensors: tensors.update({name: stored[0] if len(stored) == 1 else stored})


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def spoil(name, at, byte):
    def edit(tensors):
        dtype, shape, blob = tensors[name]
        tensors[name] = dtype, shape, blob[:at] + byte + blob[at + len(byte) :]

    return edit


PARTS = [f"{EXPERT}.{part}" for part in ("weight", "weight_scale", "weight_scale_2", "input_scale")]
NAN = np.float32(np.nan).tobytes()
DAMAGES = {
    "no factor": (drop(f"{EXPERT}.weight_scale_2"), rf"1 missing tensor: {EXPERT}\.weight_scale_2"),
    "no scales": (drop(f"{EXPERT}.weight_scale"), rf"1 missing tensor: {EXPERT}\.weight_scale"),
    "no words": (drop(f"{EXPERT}.weight"), rf"1 missing tensor: {EXPERT}\.weight"),
    "no words of expert 0": (
        drop("model.layers.1.mlp.experts.0.up_proj.weight"),
        r"1 missing tensor: model\.layers\.1\.mlp\.experts\.0\.up_proj\.weight",
    ),
    "no expert": (drop(*PARTS), rf"1 missing tensor: {EXPERT}\.weight"),
    "an expert too many": (
        lambda tensors: tensors.update(
            {name.replace("experts.7", "experts.8"): tensors[name] for name in PARTS}
        ),
        r"4 unexpected tensors: model\.layers\.1\.mlp\.experts\.8\.up_proj\.weight,",
    ),
    "words of another shape": (
        put(f"{EXPERT}.weight", "U8", (128, 63), bytes(128 * 63)),
        rf"{EXPERT}\.weight \(model\.safetensors\) is U8 \[128, 63\], expected U8 \[128, 64\]",
    ),
    "words of another type": (
        put(f"{EXPERT}.weight", "I8", (128, 64), bytes(128 * 64)),
        rf"{EXPERT}\.weight \(model\.safetensors\) is I8 \[128, 64\], expected U8 \[128, 64\]",
    ),
    "scales of 32 values": (
        put(f"{EXPERT}.weight_scale", "F8_E4M3", (128, 4), bytes(512)),
        rf"{EXPERT}\.weight_scale \(.*\) is F8_E4M3 \[128, 4\], expected F8_E4M3 \[128, 8\]",
    ),
    "scales of another type": (
        put(f"{EXPERT}.weight_scale", "U8", (128, 8), bytes(1024)),
        rf"{EXPERT}\.weight_scale \(.*\) is U8 \[128, 8\], expected F8_E4M3 \[128, 8\]",
    ),
    "a factor a row": (
        put(f"{EXPERT}.weight_scale_2", "F32", (128,), bytes(512)),
        rf"{EXPERT}\.weight_scale_2 \(.*\) is F32 \[128\], expected F32 \[\]",
    ),
    "a factor of another type": (
        put(f"{EXPERT}.weight_scale_2", "BF16", (), bytes(2)),
        rf"{EXPERT}\.weight_scale_2 \(.*\) is BF16 \[\], expected F32 \[\]",
    ),
    "an input scale of another type": (
        put(f"{EXPERT}.input_scale", "F16", (1,), bytes(2)),
        rf"{EXPERT}\.input_scale \(.*\) is F16 \[1\], expected F32 \[1\]",
    ),
    "NaN in the factor": (
        spoil(f"{EXPERT}.weight_scale_2", 0, NAN),
        rf"{EXPERT}\.weight_scale_2 has nan at \[\], expected finite numbers",
    ),
    "NaN in the scales": (
        spoil(f"{EXPERT}.weight_scale", 17, b"\xff"),
        rf"{EXPERT}\.weight_scale has 255 at \[2, 1\], expected no NaN",
    ),
    "one dense expert": (
        lambda tensors: [
            drop(*PARTS)(tensors),
            tensors.update({f"{EXPERT}.weight": mx.zeros((128, 128))}),
        ],
        rf"{EXPERT}\.weight is fp32, expected nvfp4-global like model\.layers\.1\.mlp\.experts\.0",
    ),
    "scales of a dense weight": (
        put("lm_head.weight_scale", "F8_E4M3", (256, 8), bytes(2048)),
        r"1 missing tensor: lm_head\.weight_scale_2\. lm_head\.weight .* is F32 \[256, 128\], e",
    ),
    "an input scale alone": (
        put("lm_head.input_scale", mx.array(1.0)),
        r"1 unexpected tensor: lm_head\.input_scale",
    ),
    "a packed router": (
        put("model.layers.1.mlp.gate.weight", "U8", (8, 64), bytes(512)),
        r"layers\.1\.mlp\.gate\.weight is packed by modelopt, expected BF16 or F16 or F32",
    ),
    "rotation": (
        put(f"{EXPERT}.pre_quant_scale", mx.ones((128,))),
        rf"1 unexpected tensor: {EXPERT}\.pre_quant_scale",
    ),
}


@pytest.mark.parametrize(("edit", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(tmp_path, edit, message):
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path, edit=edit))


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_2"])
def test_nan_in_kv_b_is_named_as_it_is_stored(tmp_path, part):
    byte = NAN if part == "weight_scale_2" else b"\x7f"
    with pytest.raises(ValueError, match=rf"{KV_B}\.{part} has .* at \[.*\], expected"):
        load_model(write(tmp_path, every_linear, edit=spoil(f"{KV_B}.{part}", 0, byte)))


def test_rows_that_the_groups_do_not_divide(tmp_path):
    config = config_of() | {"moe_intermediate_size": 24}
    stored, _ = modelopt.checkpoint_tensors(config, lambda path: False)
    for layer in range(1, 5):
        for e in range(8):
            name = f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight"
            stored[name] = "U8", (128, 12), bytes(1536)
            stored[f"{name}_scale"] = "F8_E4M3", (128, 2), bytes(256)
            stored[f"{name}_scale_2"] = mx.array(1.0)
    with pytest.raises(ValueError, match=r"has rows of 24, which groups of 16 .* do not divide"):
        load_model(made.write(tmp_path, config, stored))


def test_tensors_count_and_lists_of_modules_do_not(tmp_path):
    """Lists name what does not exist, leave out what is dense, and may be of any kind."""
    expected = logits(write(tmp_path / "usual"))
    stored, _ = modelopt.checkpoint_tensors(config_of())
    for i, ignore in enumerate(([], [EXPERT, "model.layers*"], ["re:(", "*" * 99], None, 7)):
        path = made.write(tmp_path / str(i), config_of(ignore=ignore), stored)
        assert np.array_equal(logits(path), expected)


ALGORITHMS = ("FP8", "W4A8_AWQ", "NVFP4_AWQ", "MIXED_PRECISION", "MXFP8", None, 4)


@pytest.mark.parametrize("found", ALGORITHMS)
@pytest.mark.parametrize("beside", [False, True])
def test_other_algorithms_are_refused(tmp_path, found, beside):
    stored, _ = modelopt.checkpoint_tensors(config_of())
    path = made.write(tmp_path, config_of(beside, quant_algo=found), stored)
    if beside:
        declare_beside(path, quant_algo=found)
    key = "hf_quant_config" if beside else "quantization_config"
    message = rf"{key}: quant_method 'modelopt' with quant_algo {found!r}, expected 'NVFP4'"
    with pytest.raises(ValueError, match=message):
        load_model(path)


def group(**weights):
    codes = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16} | weights
    return {"config_groups": {"group_0": {"weights": codes, "targets": ["Linear"]}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 32}, r"q\.group_size is 32, expected 16"),
        ({"group_size": 16.0}, r"q\.group_size is 16\.0, expected 16"),
        (group(group_size=128), r"weights\.group_size is 128, expected 16"),
        (group(num_bits=8), r"config_groups\['group_0'\]\.weights\.num_bits is 8, expected 4"),
        (group(num_bits=[2, 1]), r"weights\.num_bits is \[2, 1\], expected 4"),
        (group(type="int"), r"weights\.type is 'int', expected 'float'"),
        ({"config_groups": []}, r"q\.config_groups must be an object, found \[\]"),
        ({"config_groups": {"a": 4}}, r"\['a'\] must be an object with weights, found 4"),
        ({"config_groups": {"a": {}}}, r"\['a'\] must be an object with weights, found \{\}"),
    ],
)
def test_other_groups_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse("q", modelopt.quantization_config(**changes))


def test_scales_that_the_index_leaves_out(tmp_path):
    """As modelopt's own script for GLM-5 writes it; what else is not listed stays an error."""
    stored, _ = modelopt.checkpoint_tensors(config_of())
    expected = logits(made.write(tmp_path / "single", config_of(), stored))
    path = write_checkpoint(tmp_path / "shards", config_of(), edit=lambda _: stored, shards=2)
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    scales = [name for name in stored if name.endswith(("_scale", "_scale_2"))]
    for name in scales:
        del index["weight_map"][name]
    file.write_text(json.dumps(index))
    assert np.array_equal(logits(path), expected)
    del index["weight_map"][f"{EXPERT}.weight"]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"'{EXPERT}\.weight' is here, but .* has it in None"):
        load_model(path)


STALE = ({}, {"quant_algo": "FP8"}, {"quant_algo": None}, {"group_size": 128})


@pytest.mark.parametrize("changes", STALE)
@pytest.mark.parametrize(
    "options",
    [
        {"layout": "hf"},
        {"layout": "fp8"},
        {"quantization": {"group_size": 32, "bits": 4}},
    ],
    ids=["dense", "fp8", "mlx"],
)
def test_a_stale_declaration_does_not_count(tmp_path, options, changes):
    """It lies beside weights that were dequantized, or converted, in its folder."""
    path = write_checkpoint(tmp_path, tiny_config(), **options)
    expected = logits(path)
    declare_beside(path, **changes)
    assert np.array_equal(logits(path), expected)


def test_a_declaration_in_the_config_of_dense_weights(tmp_path):
    stored, _ = modelopt.checkpoint_tensors(config_of(), lambda path: False)
    path = made.write(tmp_path / "declared", config_of(), stored)
    plain = made.write(tmp_path / "plain", config_of(beside=True), stored)
    assert np.array_equal(logits(path), logits(plain))


def test_packed_weights_without_a_declaration(tmp_path):
    stored, _ = modelopt.checkpoint_tensors(config_of())
    path = made.write(tmp_path, config_of(beside=True), stored)
    with pytest.raises(ValueError, match=r"weight is quantized, but config\.json does not declare"):
        load_model(path)


def test_a_malformed_file_beside_the_config(tmp_path):
    stored, _ = modelopt.checkpoint_tensors(config_of())
    path = made.write(tmp_path, config_of(beside=True), stored)
    for entry in ({"quantization": 3}, {"quantization": None}, {}):
        (path / "hf_quant_config.json").write_text(json.dumps(entry))
        with pytest.raises(
            ValueError, match=r"hf_quant_config\.json: quantization .*, expected an obj"
        ):
            load_model(path)


def run_tool(monkeypatch, *arguments):
    """One of mlx-lm's commands, in this process."""
    monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
    return mlx_lm_tools.main()


def converted(tmp_path, monkeypatch, *options, beside=False, packs=PACKED["experts"]):
    """A checkpoint, the values of its weights, and what ``convert`` made of it."""
    source, target = tmp_path / "source", tmp_path / "target"
    stored, values = modelopt.checkpoint_tensors(config_of(beside), packs, "bfloat16")
    made.write(source, config_of(beside), stored)
    if beside:
        declare_beside(source)
    write_tokenizer(source)
    arguments = ("--hf-path", source, "--mlx-path", target, *options)
    assert run_tool(monkeypatch, "convert", *arguments) == 0
    dense = {name: mx.array(array).astype(mx.bfloat16) for name, array in values.items()}
    kept = {name: stored[name] for name in dense if f"{name}_scale" not in stored}
    return target, dense | kept


@pytest.mark.parametrize("beside", [False, True], ids=["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize("options", [(), ("-d",)], ids=["as it is", "-d"])
@pytest.mark.parametrize("packs", [PACKED["experts"], every_linear], ids=["experts", "every"])
def test_convert_gives_the_values(tmp_path, monkeypatch, packs, options, beside):
    target, values = converted(tmp_path, monkeypatch, *options, beside=beside, packs=packs)
    config = json.loads((target / "config.json").read_text())
    assert not {"quantization", "quantization_config", "hf_quant_config"} & config.keys()
    expected = made.write(tmp_path / "dense", tiny_config(), values)
    found, wanted = (dict(tree_flatten(load_model(p)[0].parameters())) for p in (target, expected))
    assert found.keys() == wanted.keys()
    assert [name for name in found if not mx.array_equal(found[name], wanted[name])] == []


def test_convert_quantizes_the_values(tmp_path, monkeypatch):
    target, values = converted(tmp_path, monkeypatch, "-q", "--q-bits", 8)
    model, config = load_model(target)
    assert config["quantization"]["bits"] == 8
    layer = model.layers[1].mlp.switch_mlp.up_proj
    planes = layer.weight[7], layer.scales[7], layer.biases[7]
    for plane, expected in zip(planes, mx.quantize(values[f"{EXPERT}.weight"], 64, 8), strict=True):
        assert mx.array_equal(plane, expected)


def test_stock_code_refuses_what_it_would_mistake(tmp_path):
    """Without its factor a weight is another, so MLX must not take one for its own nvfp4."""
    layer = load_model(write(tmp_path))[0].layers[1].mlp.switch_mlp.up_proj
    with pytest.raises(ValueError, match="nvfp4-global"):
        mx.dequantize(layer.weight, layer.scales, None, layer.group_size, layer.bits, layer.mode)


@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_2"])
def test_nan_is_named_where_weights_become_dense(tmp_path, part):
    byte = NAN if part == "weight_scale_2" else b"\x7f"
    path = write(tmp_path, edit=spoil(f"{EXPERT}.{part}", 0, byte))
    with pytest.raises(ValueError, match=rf"{EXPERT}\.{part} has .* at \[.*\], expected"):
        Engine(path, tokenizer=False, only_mlx_formats=True)


def test_lora_trains_on_the_values(tmp_path, monkeypatch, capsys):
    """And what it gives is used with the packed weights."""
    source, data, adapter = write(tmp_path / "model", dtype="bfloat16"), tmp_path / "data", "a"
    write_tokenizer(source)
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text(4 * (json.dumps({"text": "w3 w5 w7 w9"}) + "\n"))
    mx.disable_compile()
    try:
        arguments = ("--model", source, "--train", "--data", data, "--iters", 2, "--batch-size", 2)
        arguments += ("--num-layers", 2, "--adapter-path", tmp_path / adapter)
        assert run_tool(monkeypatch, "lora", *arguments) == 0
        generate = ("--model", source, "--adapter-path", tmp_path / adapter, "--prompt", "w3")
        generate += ("--max-tokens", 3, "--ignore-chat-template")
        assert run_tool(monkeypatch, "generate", *generate) == 0
    finally:
        mx.enable_compile()
