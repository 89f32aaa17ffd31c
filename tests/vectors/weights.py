"""Makes random checkpoints with the tensor names of the releases."""

import math
from collections.abc import Iterator

import torch
from cases import Case, Config

Tensors = dict[str, torch.Tensor]

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
BLOCK = 128
# Latents and embeddings are small, so that a wrong norm epsilon shows in the logits.
SMALL = 0.05
NOT_QUANTIZED = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "indexer.weights_proj")


def indexer_types(config: Config) -> list[str]:
    """``full`` or ``shared`` for each layer, by the keys in the releases' order of authority."""
    if types := config.get("indexer_types"):
        return list(types)
    if pattern := config.get("index_topk_pattern"):
        return [{"F": "full", "S": "shared"}[letter] for letter in pattern]
    freq, offset = config.get("index_topk_freq", 1), config.get("index_skip_topk_offset", 2)
    full = (max(i - offset + 1, 0) % freq == 0 for i in range(config["num_hidden_layers"]))
    return ["full" if is_full else "shared" for is_full in full]


def full_layers(config: Config) -> list[int]:
    return [i for i, kind in enumerate(indexer_types(config)) if kind == "full"]


def _mlp_shapes(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def _attention_shapes(prefix: str, c: Config, full: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads, nope, rope, v = (
        c[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    hidden, q_lora, kv_lora = c["hidden_size"], c["q_lora_rank"], c["kv_lora_rank"]
    yield f"{prefix}.q_a_proj.weight", (q_lora, hidden)
    yield f"{prefix}.q_a_layernorm.weight", (q_lora,)
    yield f"{prefix}.q_b_proj.weight", (heads * (nope + rope), q_lora)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (kv_lora + rope, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (kv_lora,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (nope + v), kv_lora)
    yield f"{prefix}.o_proj.weight", (hidden, heads * v)
    if full:
        index_heads, index_dim = c["index_n_heads"], c["index_head_dim"]
        yield f"{prefix}.indexer.wq_b.weight", (index_heads * index_dim, q_lora)
        yield f"{prefix}.indexer.wk.weight", (index_dim, hidden)
        yield f"{prefix}.indexer.k_norm.weight", (index_dim,)
        yield f"{prefix}.indexer.k_norm.bias", (index_dim,)
        yield f"{prefix}.indexer.weights_proj.weight", (index_heads, hidden)


def tensor_shapes(c: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of a checkpoint."""
    hidden = c["hidden_size"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    mtp = c["num_nextn_predict_layers"]
    for i, kind in enumerate([*indexer_types(c), *["full"] * mtp]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield from _attention_shapes(f"{layer}.self_attn", c, kind == "full")
        if i < c["first_k_dense_replace"]:
            yield from _mlp_shapes(f"{layer}.mlp", hidden, c["intermediate_size"])
            continue
        inner = c["moe_intermediate_size"]
        yield f"{layer}.mlp.gate.weight", (c["n_routed_experts"], hidden)
        yield f"{layer}.mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
        for expert in range(c["n_routed_experts"]):
            yield from _mlp_shapes(f"{layer}.mlp.experts.{expert}", hidden, inner)
        shared = inner * c["n_shared_experts"]
        yield from _mlp_shapes(f"{layer}.mlp.shared_experts", hidden, shared)
        if i >= c["num_hidden_layers"]:
            yield f"{layer}.eh_proj.weight", (hidden, 2 * hidden)
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


def _scaled(name: str, noise: torch.Tensor, case: Case) -> torch.Tensor:
    """Scale unit noise so that activations have order one, attention and routing are not flat."""
    if name.endswith("e_score_correction_bias"):
        return case.bias_mean + 0.1 * noise
    if name.endswith("k_norm.bias"):
        return 0.3 * noise
    if noise.dim() == 1:
        return 1 + 0.2 * noise
    if "embed_tokens" in name:
        return SMALL * noise
    weight = noise / math.sqrt(noise.shape[1])
    if "indexer.wk." in name:
        weight *= SMALL
    elif "kv_a_proj_with_mqa" in name:
        weight[: case.config["kv_lora_rank"]] *= SMALL
    elif "q_a_proj" in name:
        weight *= SMALL
    elif any(part in name for part in ("q_b_proj", "lm_head", "mlp.gate.")):
        weight *= 2
    return weight


def _is_quantized(name: str, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and not any(part in name for part in NOT_QUANTIZED)


def make_weights(case: Case) -> Tensors:
    """The case's fp32 weights; those of the FP8 case are rounded to bf16 before quantization."""
    generator = torch.Generator().manual_seed(case.weight_seed)
    tensors = {}
    for name, shape in tensor_shapes(case.config):
        weight = _scaled(name, torch.randn(shape, generator=generator), case)
        if case.fp8 and _is_quantized(name, weight):
            blocks = [math.ceil(size / BLOCK) for size in shape]
            exponents = torch.randint(-2, 2, blocks, generator=generator)
            weight *= _spread(torch.exp2(exponents), shape)
        tensors[name] = weight.bfloat16().float() if case.fp8 else weight
    return tensors


def _spread(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Repeat each block's scale for its elements, cut to the ragged shape."""
    full = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return full[: shape[0], : shape[1]]


def _block_scales(weight: torch.Tensor) -> torch.Tensor:
    """For each block the smallest power of two that keeps the block within e4m3."""
    rows, columns = (math.ceil(size / BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    largest = padded.view(rows, BLOCK, columns, BLOCK).amax((1, 3))
    return torch.exp2(torch.ceil(torch.log2(largest / FP8_MAX)))


def quantize_fp8(tensors: Tensors) -> Tensors:
    """The release's form: e4m3 weights with ``weight_scale_inv``, and the rest in bf16."""
    stored = {}
    for name, weight in tensors.items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = weight
        elif _is_quantized(name, weight):
            scales = _block_scales(weight)
            stored[name] = (weight / _spread(scales, weight.shape)).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scales
        else:
            stored[name] = weight.bfloat16()
    return stored


def dequantize(stored: Tensors) -> Tensors:
    """The fp32 weights, which are e4m3 values times scales; bf16 holds them exactly, too."""
    tensors = {}
    for name, weight in stored.items():
        if name.endswith("_scale_inv"):
            continue
        tensors[name] = weight.float()
        if weight.dtype == torch.float8_e4m3fn:
            tensors[name] *= _spread(stored[name + "_scale_inv"], weight.shape)
        assert torch.equal(tensors[name], tensors[name].bfloat16().float()) or weight.dtype == (
            torch.float32
        ), name
    return tensors
