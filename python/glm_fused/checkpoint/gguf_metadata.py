"""What the metadata of a GGUF file say of a model: `glm_fused.checkpoint.gguf_config` reads it."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from ..models.config import ModelArgs
from ..models.rope import RopeParameters
from .gguf_config import ARCHITECTURE, LOG_MULTIPLIER, SIGMOID, SIZES, STOP_TOKENS

_QUANTIZATION_VERSION = 2  # of ggml's blocks


def metadata_of(args: ModelArgs, name: str, stop_tokens: list[int]) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for a model.

    Raises ValueError for more stop tokens than there are keys for.
    """
    if len(stop_tokens) > len(STOP_TOKENS):
        raise ValueError(
            f"[gguf] eos_token_id is {stop_tokens}, expected at most {len(STOP_TOKENS)} tokens, for"
            f" which GGUF has {', '.join(STOP_TOKENS)}."
        )
    rank, rope = args.kv_lora_rank, args.qk_rope_head_dim
    dense = takewhile(lambda layer: not layer.is_sparse, args.layers)
    sizes = {theirs: getattr(args, ours) or 0 for ours, theirs in SIZES.items()}
    values = sizes | {
        "block_count": len(args.model_layers),
        "vocab_size": args.vocab_size,
        "attention.head_count_kv": 1,  # MLA is one head of latent keys
        "attention.key_length": rank + rope,
        "attention.value_length": rank,
        "attention.key_length_mla": args.qk_head_dim,
        "attention.layer_norm_rms_epsilon": args.rms_norm_eps,
        "attention.indexer.types": [layer.is_full for layer in args.model_layers],
        "leading_dense_block_count": sum(1 for _ in dense),
        "expert_group_count": args.n_group,
        "expert_group_used_count": args.topk_group,
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": args.routed_scaling_factor,
        "expert_weights_norm": args.norm_topk_prob,
        "rope.freq_base": args.rope.theta,
    }
    if args.has_mtp:
        values["nextn_predict_layers"] = 1
    if args.rope.rope_type != "default":
        values |= _yarn(args.rope)
    keys: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    keys |= {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}
    for key, token in zip(STOP_TOKENS, stop_tokens, strict=False):
        keys[f"tokenizer.ggml.{key}"] = token
    return keys


def _yarn(rope: RopeParameters) -> dict[str, Any]:
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope.factor,
        "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": rope.beta_fast,
        "rope.scaling.yarn_beta_slow": rope.beta_slow,
    }
    if rope.mscale_all_dim:
        values["rope.scaling.yarn_log_multiplier"] = LOG_MULTIPLIER * rope.mscale_all_dim
    if rope.attention_factor is not None:
        values["rope.scaling.yarn_attn_factor"] = rope.attention_factor
    return values
