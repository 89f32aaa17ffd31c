"""Writes tiny GLM-5 models as GGUF, with the names and the writer of the `gguf` package."""

import json
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from conftest import DTYPES, full_layers, hf_tensors, tiny_config

ARCHITECTURE = gguf.MODEL_ARCH.GLM_DSA
Q = gguf.GGMLQuantizationType
TYPES = {"float16": Q.F16, "bfloat16": Q.BF16, "float32": Q.F32}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight")  # and what has one dimension


def gguf_tensors(config, *, dtype="bfloat16", kv_b="split", experts="split", **drawn):
    """`{GGUF name: float32 array}` of what `conftest.hf_tensors` draws in ``dtype``.

    ``kv_b`` is "split" or "joined", and so is ``experts``, of which gate and up may share a tensor.
    """
    tensors = hf_tensors(config, DTYPES[dtype], **drawn)
    arrays = {name: np.array(values.astype(mx.float32)) for name, values in tensors.items()}
    _stack_experts(config, arrays)
    if kv_b == "split":
        _split_kv_b(config, arrays)
    layers = config["num_hidden_layers"] + 1
    names = gguf.get_tensor_name_map(ARCHITECTURE, layers)
    found = {}
    for name, values in arrays.items():
        name = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
        found[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    if experts == "joined":
        for gate in [name for name in found if name.endswith("ffn_gate_exps.weight")]:
            both = [found.pop(gate), found.pop(gate.replace("gate", "up"))]
            found[gate.replace("gate", "gate_up")] = np.concatenate(both, axis=1)
    return found


def _stack_experts(config, arrays):
    for first in [name for name in arrays if ".mlp.experts.0.gate_proj." in name]:
        prefix = first.partition(".experts.0.")[0]
        for projection in _PROJECTIONS:
            parts = [
                arrays.pop(f"{prefix}.experts.{e}.{projection}.weight")
                for e in range(config["n_routed_experts"])
            ]
            arrays[f"{prefix}.experts.{projection}.weight"] = np.stack(parts)


def _split_kv_b(config, arrays):
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for name in [name for name in arrays if name.endswith("kv_b_proj.weight")]:
        joined = arrays.pop(name)
        per_head = joined.reshape(heads, nope + config["v_head_dim"], -1)
        prefix = name.removesuffix("kv_b_proj.weight")
        transposed = np.ascontiguousarray(per_head[:, :nope].swapaxes(-1, -2))
        arrays[f"{prefix}k_b_proj.weight"] = transposed
        arrays[f"{prefix}v_b_proj.weight"] = np.ascontiguousarray(per_head[:, nope:])


def metadata(config, *, mtp=False, indexer_types=True):
    """`{key: value}` of what llama.cpp's converter writes for a config."""
    layers, arch = config["num_hidden_layers"], "glm-dsa"
    rope, kv_lora = config["qk_rope_head_dim"], config["kv_lora_rank"]
    values = {
        "block_count": layers + mtp,
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.q_lora_rank": config["q_lora_rank"],
        "attention.kv_lora_rank": kv_lora,
        "attention.key_length": kv_lora + rope,
        "attention.value_length": kv_lora,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rope,
        "attention.value_length_mla": config["v_head_dim"],
        "attention.indexer.head_count": config["index_n_heads"],
        "attention.indexer.key_length": config["index_head_dim"],
        "attention.indexer.top_k": config["index_topk"],
        "rope.dimension_count": rope,
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_gating_func": 2,
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": True,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "vocab_size": config["vocab_size"],
    }
    if mtp:
        values["nextn_predict_layers"] = 1
    if indexer_types:
        values["attention.indexer.types"] = full_layers(config)
    eos = {"tokenizer.ggml.eos_token_id": 250, "tokenizer.ggml.eot_token_id": 251}
    return {f"{arch}.{key}": value for key, value in values.items()} | eos


def tokenizer_metadata(folder):
    """`{key: value}` for the byte-level BPE in a folder's tokenizer.json; "glm4" cuts its words."""
    content = json.loads((Path(folder) / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    added = {token["content"]: token for token in content["added_tokens"]}
    ids = vocabulary | {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    kinds = [(3 if added[t]["special"] else 4) if t in added else 1 for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "glm4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }


def write_gguf(path, config=None, *, types=None, values=None, edit=None, raw=None, **options):
    """Write a model; returns ``path``.

    ``types(name)`` may give a tensor's type, ``values`` are further keys (None removes one), and
    ``edit(tensors)`` may change the arrays before they are written, or ``raw`` be
    `{name: (data, type)}` in their place. ``options`` are those of `gguf_tensors` and `metadata`.
    """
    config = dict(config or tiny_config())
    of_metadata = {k: options.pop(k) for k in ("indexer_types",) if k in options}
    dtype = options.get("dtype", "bfloat16")
    keys = metadata(config, mtp=options.get("mtp", False), **of_metadata) | (values or {})
    if raw is None:
        tensors = gguf_tensors(config, **options)
        tensors = (edit(tensors) if edit else None) or tensors
        raw = {name: _typed(name, array, dtype, types) for name, array in tensors.items()}
    return write_file(path, keys, raw)


def _typed(name, values, dtype, types):
    kind = types(name) if types else None
    if kind is None:
        plain = values.ndim == 1 or name.endswith(_ALWAYS_F32)
        kind = Q.F32 if plain else TYPES[dtype]
    return gguf.quants.quantize(values, kind), kind


def write_file(path, keys, tensors):
    """Write a file of `{key: value}` and `{name: (data, type)}`; returns ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "glm-dsa")
    for key, value in keys.items():
        if value is not None:
            _add(writer, key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    if key == gguf.Keys.General.ALIGNMENT:
        writer.add_custom_alignment(value)
    elif isinstance(value, (list, tuple)):
        writer.add_array(key, value)
    else:
        kinds.get(type(value), writer.add_string)(key, value)
