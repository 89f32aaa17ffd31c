"""Every module of a model with its shapes, from the config alone."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .config import ModelArgs

_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Module:
    """A module that owns a ``weight``, named as in the MLX layout.

    ``kind`` groups modules for reports. ``experts`` is the number of stacked experts, else 0.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    quantizable: bool = True
    bias: tuple[str, int] | None = None  # name under ``path`` and size
    experts: int = 0

    @property
    def columns(self) -> int:
        return self.shape[-1]


def modules(args: ModelArgs) -> Iterator[Module]:
    """The modules in execution order."""
    vocab, hidden = args.vocab_size, args.hidden_size
    yield Module("model.embed_tokens", (vocab, hidden), "embedding")
    for i in range(args.num_hidden_layers):
        prefix = f"model.layers.{i}"
        yield _norm(f"{prefix}.input_layernorm", hidden)
        yield from _attention(args, f"{prefix}.self_attn")
        if args.is_full(i):
            yield from _indexer(args, f"{prefix}.self_attn.indexer")
        yield _norm(f"{prefix}.post_attention_layernorm", hidden)
        if args.is_sparse(i):
            yield from _experts(args, f"{prefix}.mlp")
        else:
            yield from _mlp(args, f"{prefix}.mlp", args.intermediate_size, "dense MLP")
    yield _norm("model.norm", hidden)
    if not args.tie_word_embeddings:
        yield Module("lm_head", (vocab, hidden), "head")


def _norm(path: str, size: int, bias: bool = False) -> Module:
    return Module(path, (size,), "norms", False, ("bias", size) if bias else None)


def _attention(args: ModelArgs, prefix: str) -> Iterator[Module]:
    hidden, heads = args.hidden_size, args.num_attention_heads
    q_lora, kv_lora = args.q_lora_rank, args.kv_lora_rank
    nope, v, kind = args.qk_nope_head_dim, args.v_head_dim, "attention"

    def linear(name: str, rows: int, columns: int, biased: bool = False) -> Module:
        bias = ("bias", rows) if biased and args.attention_bias else None
        return Module(f"{prefix}.{name}", (rows, columns), kind, bias=bias)

    yield linear("q_a_proj", q_lora, hidden, True)
    yield _norm(f"{prefix}.q_a_layernorm", q_lora)
    yield linear("q_b_proj", heads * args.qk_head_dim, q_lora)
    yield linear("kv_a_proj_with_mqa", kv_lora + args.qk_rope_head_dim, hidden, True)
    yield _norm(f"{prefix}.kv_a_layernorm", kv_lora)
    yield Module(f"{prefix}.embed_q", (heads, kv_lora, nope), "embed_q")
    yield Module(f"{prefix}.unembed_out", (heads, v, kv_lora), "unembed_out")
    yield linear("o_proj", hidden, heads * v, True)


def _indexer(args: ModelArgs, prefix: str) -> Iterator[Module]:
    heads, size, kind = args.index_n_heads, args.index_head_dim, "indexer"
    yield Module(f"{prefix}.wq_b", (heads * size, args.q_lora_rank), kind)
    yield Module(f"{prefix}.wk", (size, args.hidden_size), kind)
    yield _norm(f"{prefix}.k_norm", size, bias=True)
    yield Module(f"{prefix}.weights_proj", (heads, args.hidden_size), kind)


def _mlp(args: ModelArgs, prefix: str, size: int, kind: str) -> Iterator[Module]:
    for name, shape in _projections(args, size).items():
        yield Module(f"{prefix}.{name}", shape, kind)


def _experts(args: ModelArgs, prefix: str) -> Iterator[Module]:
    count = args.n_routed_experts or 0
    bias = ("e_score_correction_bias", count)
    yield Module(f"{prefix}.gate", (count, args.hidden_size), "router", False, bias)
    size = args.moe_intermediate_size
    for name, shape in _projections(args, size).items():
        kind = f"experts {name.removesuffix('_proj')}"
        yield Module(f"{prefix}.switch_mlp.{name}", (count, *shape), kind, experts=count)
    if args.n_shared_experts:
        size *= args.n_shared_experts
        yield from _mlp(args, f"{prefix}.shared_experts", size, "shared experts")


def _projections(args: ModelArgs, size: int) -> dict[str, tuple[int, int]]:
    hidden = args.hidden_size
    return dict(zip(PROJECTIONS, ((size, hidden), (size, hidden), (hidden, size)), strict=True))


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def unused(name: str, args: ModelArgs) -> str | None:
    """Why the model does not use a tensor that releases may carry, or None."""
    if name.endswith("rotary_emb.inv_freq"):
        return "rotary tables"
    if name.startswith("lm_head.") and args.tie_word_embeddings:
        return "tied head"
    layer = layer_of(name)
    if layer is None:
        return None
    if layer >= args.num_hidden_layers:
        return "MTP layer"
    if ".self_attn.indexer." in name and not args.is_full(layer):
        return "indexer of a shared layer"
    return None
