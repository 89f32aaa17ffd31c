"""The description of a checkpoint from headers alone, checked by the releases' own numbers."""

import json
import math
import os
import struct
import time

import pytest
from conftest import tiny_config, tiny_config_51
from expert_counts import unlike_experts
from mlx.utils import tree_flatten

from glm_fused.checkpoint.description import describe, format_description, variant
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.quantization import parse_format
from glm_fused.loader import load_model
from glm_fused.models.cache import bytes_per_token
from glm_fused.models.config import DeepseekV32Args, ModelArgs, args_from_config
from glm_fused.models.tensors import modules

GLM_52 = {
    "model_type": "glm_moe_dsa",
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    "eos_token_id": [154820, 154827, 154829],
}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
AFFINE_4 = {"group_size": 64, "bits": 4, "mode": "affine"}


def hollow_file(path, tensors):
    """Write a safetensors file with a true header and a hole for its data."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * {"BF16": 2, "F32": 4, "U32": 4, "U8": 1}[dtype]
        offsets = [offset, offset + size]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)


def stacked_tensors(args, quantization):
    """The names, types and shapes in a uniformly quantized MLX checkpoint."""
    fmt, tensors = parse_format("", quantization), {}
    for module in modules(args):
        if module.bias:
            dtype = "F32" if module.kind == "router" else "BF16"
            tensors[f"{module.path}.{module.bias[0]}"] = (dtype, [module.bias[1]])
        if not module.quantizable:
            tensors[f"{module.path}.weight"] = ("BF16", list(module.shape))
            continue
        *rows, columns = module.shape
        scales = [*rows, columns // fmt.group_size]
        tensors[f"{module.path}.weight"] = ("U32", [*rows, columns * fmt.bits // 32])
        tensors[f"{module.path}.scales"] = ("BF16" if fmt.mode == "affine" else "U8", scales)
        if fmt.mode == "affine":
            tensors[f"{module.path}.biases"] = ("BF16", scales)
    return tensors


def release_tensors(args):
    """The names, types and shapes in the bf16 release, without its MTP layer."""
    tensors = {}
    for module in modules(args):
        path, shape = module.path, list(module.shape)
        if module.bias:
            tensors[f"{path}.{module.bias[0]}"] = ("F32", [module.bias[1]])
        if module.experts:
            for e in range(module.experts):
                expert = path.replace("switch_mlp", f"experts.{e}")
                tensors[f"{expert}.weight"] = ("BF16", shape[1:])
        elif path.endswith("embed_q"):
            rows = args.num_attention_heads * (args.qk_nope_head_dim + args.v_head_dim)
            kv_b = path.replace("embed_q", "kv_b_proj")
            tensors[f"{kv_b}.weight"] = ("BF16", [rows, args.kv_lora_rank])
        elif not path.endswith("unembed_out"):
            tensors[f"{path}.weight"] = ("BF16", shape)
    return tensors


def hollow_checkpoint(directory, config, tensors, shards=1):
    (directory / "config.json").write_text(json.dumps(config))
    names, weight_map = list(tensors), {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        hollow_file(directory / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    index = {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize(
    ("quantization", "on_disk", "per_token"), [(MXFP4, 395.1, 21.58), (AFFINE_4, 418.3, 22.84)]
)
def test_glm_52_as_published(tmp_path, quantization, on_disk, per_token):
    config = GLM_52 | {"quantization": quantization}
    tensors = stacked_tensors(args_from_config(GLM_52), quantization)
    found = describe(hollow_checkpoint(tmp_path, config, tensors, shards=80))
    assert found["variant"] == "GLM-5.2/5.3"
    assert found["bytes_on_disk"] / 1e9 == pytest.approx(on_disk, abs=0.1)
    assert found["bytes_read_per_token"] / 1e9 == pytest.approx(per_token, abs=0.01)
    assert found["active_parameters"] / 1e9 == pytest.approx(40.3, abs=0.05)
    assert found["kv_bytes_per_token"] == 95_232
    assert found["full_layers"].startswith("0-2, 6, 10, 14")
    assert found["full_layers"].endswith("70, 74")
    assert found["shared_layers"].startswith("3-5, 7-9")
    assert found["expert_layers"] == "3-77"
    assert found["context_length"] == 1_048_576
    assert found["eos_token_id"] == [154820, 154827, 154829]


def test_release_of_282_shards(tmp_path):
    args = args_from_config(GLM_52)
    path = hollow_checkpoint(tmp_path, GLM_52, release_tensors(args), shards=282)
    start = time.process_time()
    found = describe(path)
    assert time.process_time() - start < 10  # 1 to 3 s; a quadratic step would take minutes
    assert found["files"] == 282
    assert found["bytes_loaded"] / 1e12 == pytest.approx(1.487, abs=0.001)
    assert found["formats"]["experts up"]["formats"] == ["bf16"]


def test_cache_and_variant():
    assert bytes_per_token(ModelArgs()) == 109_824
    assert variant(ModelArgs()) == "GLM-5/5.1"
    assert variant(ModelArgs(n_routed_experts=160)) == (
        "GLM-5/5.1, REAP-pruned to 160 of 256 experts"
    )
    assert variant(DeepseekV32Args()) == "DeepSeek-V3.2"


OVERRIDES = {
    "model.embed_tokens": {"group_size": 64, "bits": 6},
    "model.layers.1.mlp.switch_mlp.down_proj": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}


@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_formats_by_kind(checkpoint, layout):
    path = checkpoint(layout=layout, quantization=AFFINE_4 | OVERRIDES, mtp=True)
    found = describe(path)
    formats = {name: kind["formats"] for name, kind in found["formats"].items()}
    assert formats["embedding"] == ["affine6"]
    assert formats["experts down"] == ["affine4", "mxfp8"]
    assert formats["experts up"] == ["affine4"]
    assert formats["router"] == formats["norms"] == ["bf16"]
    assert found["formats"]["experts up"]["bits_per_weight"] == 4.5
    assert set(found["ignored_tensors"]) == {"MTP layer"}
    assert json.loads(json.dumps(found)) == found


def test_experts_count_by_the_share_used(checkpoint):
    kinds = describe(checkpoint())["formats"]
    assert kinds["experts up"]["bytes_read_per_token"] == kinds["experts up"]["bytes"] * 2 / 8
    assert kinds["head"]["bytes_read_per_token"] == kinds["head"]["bytes"]


def test_fp8_is_read_as_bfloat16(checkpoint):
    kind = describe(checkpoint(layout="fp8"))["formats"]["dense MLP"]
    assert kind["formats"] == ["fp8"]
    assert kind["bits_per_weight"] == pytest.approx(8, abs=0.01)
    assert kind["bytes_read_per_token"] == 2 * kind["weights"]


def move_mtp(tensors):
    """The names under which oMLX keeps the MTP layer."""
    renamed = {}
    for name, array in tensors.items():
        rest = name.removeprefix("model.layers.5.")
        if rest == name:
            renamed[name] = array
        elif rest.split(".")[0] in ("eh_proj", "enorm", "hnorm"):
            renamed[f"mtp.0.{rest}"] = array
        elif rest.startswith("shared_head."):
            renamed[f"mtp.0.{rest.removeprefix('shared_head.')}"] = array
        else:
            renamed[f"mtp.0.block.{rest}"] = array
    return renamed


@pytest.mark.parametrize("layout", ["mlx", "hf", "hf-fused"])
@pytest.mark.parametrize("edit", [None, move_mtp], ids=["release", "oMLX"])
def test_mtp_layers_are_listed(checkpoint, layout, edit):
    assert describe(checkpoint(layout=layout))["mtp_layers"] == []
    path = checkpoint(layout=layout, mtp=True, edit=edit)
    found = describe(path)
    (layer,) = found["mtp_layers"]
    assert (layer["layer"], layer["missing"]) == (5, [])
    assert found["ignored_tensors"] == {"MTP layer": layer["tensors"]}
    stored = Checkpoint.open(path).tensors.items()
    mtp = [t.nbytes for name, t in stored if name.startswith(("mtp.0.", "model.layers.5."))]
    assert (layer["tensors"], layer["nbytes"]) == (len(mtp), sum(mtp))
    text = format_description(found)
    assert f"MTP layer   5: {layer['tensors']} tensors" in text
    drafts, model = found["drafts"], load_model(path, mtp=True)[0]
    assert drafts["kv_bytes_per_token"] == 2 * (128 + 32 + 64)
    assert drafts["bytes_loaded"] == model.weight_bytes
    held = dict(tree_flatten(model.model.mtp.parameters())).items()
    unread = sum(array.nbytes for name, array in held if "switch_mlp" in name) * 6 // 8
    read = sum(array.nbytes for _, array in held) - unread + model.lm_head.weight.nbytes
    assert drafts["bytes_read_per_draft"] == read
    assert "drafts      " in text and "fused, full, 8 experts in memory: bf16/bf16/bf16" in text


def test_mtp_layer_that_lacks_a_weight(checkpoint):
    lost = "model.layers.5.mlp.experts.3.up_proj.weight"
    path = checkpoint(
        layout="hf", mtp=True, edit=lambda tensors: {k: tensors[k] for k in tensors if k != lost}
    )
    found = describe(path)
    assert found["mtp_layers"][0]["missing"] == [lost]
    assert found["drafts"] is None
    assert "lacks 1 weight; for drafts alone" in format_description(found)


def test_quantized_indexers_are_warned_of(checkpoint):
    (warning,) = describe(checkpoint(quantization=AFFINE_4))["warnings"]
    assert "indexers are quantized (affine4)" in warning
    assert warning[:40] in format_description(describe(checkpoint(quantization=AFFINE_4)))
    kept = {
        f"model.layers.{i}.self_attn.indexer.{name}": False
        for i in range(5)
        for name in ("wk", "wq_b")
    }
    assert describe(checkpoint(quantization=AFFINE_4 | kept))["warnings"] == []
    assert describe(checkpoint(layout="fp8"))["warnings"] == []


def test_unlike_numbers_of_experts(checkpoint):
    counts = [0, 8, 4, 6, 3]
    found = describe(unlike_experts(checkpoint, counts))
    assert (found["experts"], found["experts_by_layer"]) == (8, counts)
    assert found["variant"].endswith("REAP-pruned to 3 to 8 of 256 experts")
    assert "experts     3 to 8, 2 a token" in format_description(found)
    shares = {"experts up": sum(counts) * 128 * 128 * 2, "router": sum(counts) * (128 * 2 + 4)}
    assert {name: found["formats"][name]["bytes"] for name in shares} == shares
    per_token = found["formats"]["experts up"]["bytes_read_per_token"]
    assert per_token == 4 * 2 * 128 * 128 * 2


def test_report_text(checkpoint):
    text = format_description(describe(checkpoint(tiny_config(), mtp=True)))
    for part in (
        "GLM-5.2/5.3",
        "full      0-1, 3",
        "shared    2, 4",
        "MTP layer",
        "experts gate",
        "bf16",
    ):
        assert part in text
    assert all(len(line) <= 100 for line in text.splitlines() if "path" not in line)
    text = format_description(describe(checkpoint(tiny_config_51())))
    assert "full      0-4" in text
    assert "shared    none" in text
