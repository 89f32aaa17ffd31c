"""Every way in which a checkpoint can be wrong gives one error that names what and where."""

import json
import os
import struct

import mlx.core as mx
import numpy as np
import pytest
from conftest import make_tensors, tiny_config, write_checkpoint, write_safetensors

from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.safetensors_header import read_header
from glm_fused.loader import load_model

AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
Q_A = "model.layers.1.self_attn.q_a_proj"
EXPERT = "model.layers.1.mlp.experts.7.up_proj"
SWITCH = "model.layers.1.mlp.switch_mlp.up_proj"


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin=0, end=8, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HEADER_ERRORS = {
    "not JSON": (b"{nope}", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8"),
    "too deep": (b"[" * 100_000, "nested too deeply"),
    "a list": (b"[]", "JSON object"),
    "duplicate": (b'{"a": {}, "a": {}}', "duplicate key 'a'"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "entry": ({"a": 3}, "tensor 'a' must have exactly"),
    "field": ({"a": {**entry(), "x": 1}}, "tensor 'a' must have exactly"),
    "dtype": ({"a": entry(dtype="Q4")}, "tensor 'a' has dtype 'Q4'"),
    "shape": ({"a": entry(shape=(-2,))}, r"tensor 'a' has shape \[-2\]"),
    "float shape": ({"a": {**entry(), "shape": [2.0]}}, "tensor 'a' has shape"),
    "rank": ({"a": entry(shape=[1] * 40)}, "40 dimensions"),
    "huge": ({"a": entry(shape=[2**62] * 8)}, "holds 8 bytes, expected an integer of"),
    "extent": ({"a": entry(shape=(3,))}, "tensor 'a' holds 8 bytes, expected 12"),
    "end": ({"a": entry(0, 16, shape=(4,))}, "tensor 'a' ends at byte"),
    "backwards": ({"a": entry(8, 0)}, "data_offsets"),
    "overlap": ({"a": entry(), "b": entry()}, "'b' overlaps 'a'"),
    "gap": ({"a": entry(4, 8, shape=(1,))}, "'a' leaves a gap"),
    "rest": ({"a": entry(0, 4, shape=(1,))}, "bytes, expected"),
}


@pytest.mark.parametrize(("header", "message"), HEADER_ERRORS.values(), ids=HEADER_ERRORS)
def test_bad_header(tmp_path, header, message):
    path = raw_file(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("size", [0, 7, 8, 100])
def test_truncated_header(tmp_path, size):
    path = tmp_path / "short.safetensors"
    write_safetensors(path, {"a": mx.zeros((4, 4))})
    os.truncate(path, size)
    with pytest.raises(ValueError, match="truncated"):
        read_header(path)


def test_absurd_header_size(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(tmp_path / "a.safetensors")


def test_pipes_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not a regular file"):
        read_header(tmp_path / "a.safetensors")


def test_headers_of_stock_writers(tmp_path):
    arrays = {"b": mx.zeros((3, 4), mx.bfloat16), "a": mx.zeros((5,), mx.uint32)}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), arrays, metadata={"format": "mlx"})
    header = read_header(tmp_path / "a.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in header.items()} == {
        "a": ("U32", (5,)),
        "b": ("BF16", (3, 4)),
    }


def test_missing_folder_config_and_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        Checkpoint.open(tmp_path)


def edit_index(directory, edit):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "a.bin", 7, "a" * 300])
def test_index_stays_in_the_folder(checkpoint, file):
    path = checkpoint(shards=2)
    edit_index(path, lambda weight_map: weight_map.update({"lm_head.weight": file}))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is in .* expected the plain name"):
        Checkpoint.open(path)


def test_missing_and_truncated_shard(checkpoint):
    path = checkpoint(shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model-00002-of-00003.*truncated"):
        load_model(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003.safetensors is missing"):
        load_model(path)


def test_index_against_shards(checkpoint):
    path = checkpoint(shards=2)
    edit_index(path, lambda m: m.update({"extra.weight": "model-00001-of-00002.safetensors"}))
    with pytest.raises(ValueError, match=r"'extra\.weight' is missing"):
        load_model(path)
    edit_index(path, lambda m: [m.pop("extra.weight"), m.pop("lm_head.weight")])
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is here, but .* has it in None"):
        load_model(path)


def test_tensor_in_two_shards(checkpoint):
    path = checkpoint(shards=2)
    second = path / "model-00002-of-00002.safetensors"
    write_safetensors(second, mx.load(str(second)) | {"model.embed_tokens.weight": mx.zeros((2,))})
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is in both"):
        load_model(path)


def put(name, change):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    return edit


def drop(*names):
    def edit(tensors):
        for name in names:
            del tensors[name]

    return edit


def spoil(value):
    """Set one element of the second row or matrix."""

    def change(array):
        dtype, values = array.dtype, np.array(array.astype(mx.float32))
        values[(1, *([0] * (values.ndim - 1)))] = value
        return mx.array(values).astype(dtype)

    return change


def add_extra(tensors):
    tensors["model.layers.0.mlp.extra.weight"] = mx.zeros((2, 2))


def fp8_scale(value):
    name = "model.layers.0.mlp.gate_proj.weight_scale_inv"
    return {"layout": "fp8", "edit": put(name, spoil(value))}


def kv_b(value, quantization=AFFINE):
    name = "model.layers.2.self_attn.kv_b_proj.scales"
    return {"layout": "hf", "quantization": quantization, "edit": put(name, spoil(value))}


def quantized(quantization, edit=None, **overrides):
    return {"quantization": quantization | overrides, "edit": edit}


SCALES, BIASES = f"{SWITCH}.scales", f"{SWITCH}.biases"
Q_WEIGHT = f"{Q_A}.weight"
LOAD_ERRORS = {
    "missing": ({"edit": drop(Q_WEIGHT)}, rf"1 missing tensor: {Q_WEIGHT}"),
    "missing embed_q": (
        {"edit": drop("model.layers.2.self_attn.embed_q.weight")},
        r"1 missing tensor: model\.layers\.2\.self_attn\.embed_q\.weight",
    ),
    "missing expert": (
        {"layout": "hf", "edit": drop(f"{EXPERT}.weight")},
        rf"1 missing tensor: {EXPERT}\.weight",
    ),
    "missing kv_b": (
        {"layout": "hf", "edit": drop("model.layers.2.self_attn.kv_b_proj.weight")},
        r"1 missing tensor: model\.layers\.2\.self_attn\.kv_b_proj\.weight",
    ),
    "missing indexer": (
        {"edit": drop("model.layers.3.self_attn.indexer.wk.weight")},
        r"missing tensor: model\.layers\.3\.self_attn\.indexer\.wk",
    ),
    "missing bias": (
        {"edit": drop("model.layers.1.mlp.gate.e_score_correction_bias")},
        r"missing tensor: model\.layers\.1\.mlp\.gate\.e_score_correction_bias",
    ),
    "extra": ({"edit": add_extra}, r"1 unexpected tensor: model\.layers\.0\.mlp\.extra\.weight"),
    "misshapen": (
        {"edit": put(Q_WEIGHT, lambda w: w[:-1])},
        rf"{Q_WEIGHT} \(model\.safetensors\) is BF16 \[127, 128\], expected .* \[128, 128\]",
    ),
    "misshapen expert": (
        {"layout": "hf", "edit": put(f"{EXPERT}.weight", lambda w: w[:1])},
        rf"{EXPERT}\.weight .* is BF16 \[1, 128\]",
    ),
    "too few experts": (
        {"edit": put(f"{SWITCH}.weight", lambda w: w[:4])},
        rf"{SWITCH}\.weight .* \[4, 128, 128\], expected .* \[8, 128, 128\]",
    ),
    "integer weight": (
        {"edit": put("model.norm.weight", lambda w: w.astype(mx.int32))},
        r"model\.norm\.weight .* is I32 \[128\], expected BF16 or F16 or F32",
    ),
    "half bits": (
        quantized(AFFINE, put(f"{SWITCH}.weight", lambda w: w[..., :8])),
        rf"{SWITCH}\.weight .* is U32 \[8, 128, 8\], expected U32 \[8, 128, 16\]",
    ),
    "missing scales": (quantized(AFFINE, drop(SCALES)), rf"1 missing tensor: {SCALES}"),
    "missing biases": (quantized(AFFINE, drop(BIASES)), rf"1 missing tensor: {BIASES}"),
    "scales type": (
        quantized(MXFP4, put(SCALES, lambda s: s.astype(mx.float16))),
        rf"{SCALES} .* is F16 .*, expected U8",
    ),
    "undeclared": (
        {"quantization": AFFINE, "config": {"quantization": None}},
        r"q_a_proj\.weight is quantized, but config\.json does not declare it",
    ),
    "declared dense": (
        {"config": {"quantization": AFFINE | {Q_A: MXFP4}}},
        rf"{Q_WEIGHT} has no scales, but config\.json declares it mxfp4",
    ),
    "declared false": (
        {"quantization": AFFINE, "config": {"quantization": AFFINE | {Q_A: False}}},
        rf"{Q_WEIGHT} is quantized, but config\.json does not",
    ),
    "NaN scale": (quantized(AFFINE, put(SCALES, spoil(np.nan))), rf"{SCALES} has nan at \[1, 0, 0"),
    "inf bias": (quantized(AFFINE, put(BIASES, spoil(np.inf))), rf"{BIASES} has inf at"),
    "NaN e8m0": (quantized(MXFP4, put(SCALES, spoil(255))), rf"{SCALES} has 255 at"),
    "NaN e4m3": (quantized(NVFP4, put(SCALES, spoil(0x7F))), rf"{SCALES} has 127 at"),
    "-NaN e4m3": (quantized(NVFP4, put(SCALES, spoil(0xFF))), rf"{SCALES} has 255 at"),
    "NaN kv_b": (kv_b(np.nan), r"kv_b_proj\.scales has nan at"),
    "NaN kv_b e8m0": (kv_b(255, MXFP4), r"kv_b_proj\.scales has 255 at"),
    "NaN kv_b e4m3": (kv_b(0x7F, NVFP4), r"kv_b_proj\.scales has 127 at"),
    "NaN of an expert": (
        {
            "layout": "hf",
            "quantization": AFFINE,
            "edit": put(f"{EXPERT}.scales", spoil(np.nan)),
        },
        rf"{EXPERT}\.scales has nan at \[1, 0\]",
    ),
    "NaN fp8": (fp8_scale(np.nan), r"gate_proj\.weight_scale_inv has nan at"),
    "inf fp8": (fp8_scale(np.inf), r"gate_proj\.weight_scale_inv has inf at"),
    "zero fp8": (fp8_scale(0.0), r"weight_scale_inv has 0\.0 at .* expected positive"),
    "negative fp8": (fp8_scale(-1.0), r"weight_scale_inv has -1\.0 at"),
    "missing fp8 scale": (
        {"layout": "fp8", "edit": drop(f"{Q_WEIGHT}_scale_inv")},
        rf"1 missing tensor: {Q_WEIGHT}_scale_inv",
    ),
    "misshapen fp8 scale": (
        {"layout": "fp8", "edit": put(f"{Q_WEIGHT}_scale_inv", lambda s: mx.ones((2, 1)))},
        rf"{Q_WEIGHT}_scale_inv .* is F32 \[2, 1\], expected .* \[1, 1\]",
    ),
    "another layer": (
        {"config": {"num_hidden_layers": 4, "indexer_types": ["full"] * 4}},
        r"unexpected tensors: model\.layers\.4\.",
    ),
    "another model": ({"config": {"model_type": "llama"}}, r"\[config\] model_type"),
    "too many experts": (
        {"layout": "hf", "config": {"n_routed_experts": 2**31 - 1}},
        r"at least 1000 missing tensors",
    ),
}


@pytest.mark.parametrize(("case", "message"), LOAD_ERRORS.values(), ids=LOAD_ERRORS)
def test_bad_checkpoint(checkpoint, case, message):
    case = dict(case)
    changes = case.pop("config", {})
    path = checkpoint(**case)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_model(path)


QUANTIZATION_ERRORS = {
    "mode": ({"mode": "int4"}, r"quantization: mode 'int4', expected one of affine, mxfp4"),
    "mode type": ({"mode": 4}, r"quantization: mode 4"),
    "bits": ({"bits": 7}, r"quantization: bits 7, expected 2 or 3 or 4 or 5 or 6 or 8"),
    "group": ({"group_size": 48}, r"quantization: group_size 48, expected 32 or 64 or 128"),
    "mxfp4 group": ({"group_size": 64, "mode": "mxfp4"}, r"group_size 64, expected 32 for mxfp4"),
    "nvfp4 bits": ({"bits": 8, "group_size": 16, "mode": "nvfp4"}, r"bits 8, expected 4"),
    "bool": ({"bits": True}, r"bits True"),
    "override": ({"lm_head": {"bits": 1}}, r"quantization\['lm_head'\]: bits 1"),
    "override type": ({f"{Q_A}": "4bit"}, r"q_a_proj'\] must be an object or false"),
}


@pytest.mark.parametrize(
    ("change", "message"), QUANTIZATION_ERRORS.values(), ids=QUANTIZATION_ERRORS
)
def test_impossible_quantization(checkpoint, change, message):
    path = checkpoint(tiny_config(quantization=AFFINE | change))
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            "quant_method 'gptq', expected compressed-tensors, fp8",
        ),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"quant_method": "fp8"}, "weight_block_size None"),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "quant_method 'modelopt' with quant_algo 'NVFP4'.* global scale .* not supported yet",
        ),
        ([4], "quantization_config must be an object"),
    ],
)
def test_unknown_quantization_config(checkpoint, entry, message):
    path = checkpoint(tiny_config(quantization_config=entry))
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_declaration_beside_the_config(checkpoint):
    """modelopt may write hf_quant_config.json; where config.json says something, that counts."""
    path = checkpoint(tiny_config())
    declared = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    declared = {"producer": {"name": "modelopt", "version": "0.44"}, "quantization": declared}
    (path / "hf_quant_config.json").write_text(json.dumps(declared))
    with pytest.raises(
        ValueError, match="hf_quant_config: quant_method 'modelopt' with quant_algo"
    ):
        load_model(path)
    for entry in ({"quantization": 3}, {"quantization": None}, {}):
        (path / "hf_quant_config.json").write_text(json.dumps(entry))
        with pytest.raises(
            ValueError, match=r"hf_quant_config\.json: quantization .*, expected an obj"
        ):
            load_model(path)
    path = checkpoint(tiny_config(), quantization=AFFINE)
    load_model(path, lazy=True)


def test_group_that_does_not_divide(checkpoint):
    path = checkpoint(tiny_config(moe_intermediate_size=96), quantization=AFFINE)
    tensors = make_tensors(tiny_config(moe_intermediate_size=96), quantization=AFFINE)
    down = "model.layers.1.mlp.switch_mlp.down_proj"
    weight, scales, biases = mx.quantize(mx.zeros((8, 128, 96)), group_size=32, bits=4)
    tensors |= {f"{down}.weight": weight, f"{down}.scales": scales, f"{down}.biases": biases}
    write_safetensors(path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=rf"{down}\.weight has rows of 96, which groups of 64"):
        load_model(path)


def test_lazy_loading_checks_headers_but_not_scales(checkpoint):
    path = checkpoint(quantization=AFFINE, edit=put(SCALES, spoil(np.nan)))
    load_model(path, lazy=True)
    write_checkpoint(path, edit=drop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_model(path, lazy=True)
