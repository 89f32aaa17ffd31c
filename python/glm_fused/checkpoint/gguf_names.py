"""What GGUF files call the tensors of the model."""

from __future__ import annotations

import re

_MODEL = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",  # of older files, which have none of the next two
    "attn_k_b": "self_attn.embed_q",
    "attn_v_b": "self_attn.unembed_out",
    "attn_output": "self_attn.o_proj",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "nextn.eh_proj": "eh_proj",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.shared_head_head": "shared_head.head",
    "nextn.shared_head_norm": "shared_head.norm",
}
# Tensors whose names differ in more than the module's.
_WHOLE = {
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",  # gate's rows, then up's
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
_OURS = re.compile(r"model\.layers\.([0-9]+)\.(.+)")
_TO_GGUF = {ours: name for name, ours in (_MODEL | _LAYER).items()}
_WHOLE_TO_GGUF = {ours: name for name, ours in _WHOLE.items()}


def model_name(name: str) -> str:
    """The model's name for a tensor of a GGUF file; one that it does not know stays as it is."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        module, _, leaf = name.rpartition(".")
        return f"{_MODEL[module]}.{leaf}" if module in _MODEL else name
    rest = match[2]
    module, _, leaf = rest.rpartition(".")
    found = _WHOLE.get(rest) or (f"{_LAYER[module]}.{leaf}" if module in _LAYER else None)
    return name if found is None else f"model.layers.{match[1]}.{found}"


def gguf_name(name: str) -> str:
    """What a GGUF file calls a tensor of the model, the inverse of `model_name`."""
    match = _OURS.fullmatch(name)
    prefix, rest = ("", name) if match is None else (f"blk.{match[1]}.", match[2])
    if rest in _WHOLE_TO_GGUF:
        return prefix + _WHOLE_TO_GGUF[rest]
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{_TO_GGUF[module]}.{leaf}" if module in _TO_GGUF else name
