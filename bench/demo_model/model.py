"""The demo model's shape and its first weights."""

from __future__ import annotations

import torch
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM, PreTrainedTokenizerFast


def model_config(tokenizer: PreTrainedTokenizerFast) -> GlmMoeDsaConfig:
    """The demo model's shape: GLM-5.2 in small, IndexShare included."""
    layers, freq, offset = 7, 3, 2
    return GlmMoeDsaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        moe_router_dtype="float32",
        first_k_dense_replace=1,
        mlp_layer_types=["dense"] + ["sparse"] * (layers - 1),
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        head_dim=32,
        index_topk=64,
        index_n_heads=4,
        index_head_dim=64,
        index_topk_freq=freq,
        index_skip_topk_offset=offset,
        index_topk_pattern=None,
        index_share_for_mtp_iteration=True,
        indexer_types=[
            "full" if max(i - offset + 1, 0) % freq == 0 else "shared" for i in range(layers)
        ],
        num_nextn_predict_layers=0,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        rms_norm_eps=1e-5,
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )


@torch.no_grad()
def initialise(model: GlmMoeDsaForCausalLM) -> None:
    """Fan-in scaled weights; the projections that write to the residual stream start small."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = parameter.shape[-1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std *= 0.2
        elif "embed_tokens" in name:
            std = 0.3
        elif "lm_head" in name or "mlp.gate.weight" in name:
            std = 0.02
        parameter.normal_(0.0, std)


def new_model(tokenizer: PreTrainedTokenizerFast) -> GlmMoeDsaForCausalLM:
    """The model at its first weights, drawn from torch's random stream."""
    model = GlmMoeDsaForCausalLM(model_config(tokenizer))
    initialise(model)
    return model
