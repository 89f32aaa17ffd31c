"""Which layers run their own indexer, and which have routed experts."""

from typing import Any, Protocol

from .. import validation as check

FULL, SHARED = "full", "shared"
DENSE, SPARSE = "dense", "sparse"
PATTERN_NAMES = {"F": FULL, "S": SHARED, FULL: FULL, SHARED: SHARED}


class Schedule(Protocol):
    """The keys of a config that say what its layers are; `ModelArgs` has them."""

    model_type: str
    num_hidden_layers: int
    n_routed_experts: int | None
    first_k_dense_replace: int
    moe_layer_freq: int
    mlp_layer_types: list[str] | None
    indexer_types: list[str] | None
    index_topk_pattern: str | list[str] | None
    index_topk_freq: int | None
    index_skip_topk_offset: int | None


def mlp_types(args: Schedule) -> list[str]:
    """'dense' or 'sparse' per layer: ``mlp_layer_types``, else first-k-dense and frequency."""
    layers = args.num_hidden_layers
    if args.mlp_layer_types is not None:
        return check.layer_list("mlp_layer_types", args.mlp_layer_types, layers, DENSE, SPARSE)
    if args.n_routed_experts is None:
        return [DENSE] * layers
    first, freq = args.first_k_dense_replace, args.moe_layer_freq
    return [SPARSE if i >= first and i % freq == 0 else DENSE for i in range(layers)]


def indexer_types(args: Schedule) -> list[str]:
    """'full' or 'shared' per layer: ``indexer_types``, else pattern, else frequency and offset."""
    layers = args.num_hidden_layers
    if args.model_type == "deepseek_v32":
        return [FULL] * layers
    if args.indexer_types is not None:
        key = "indexer_types"
        types = check.layer_list(key, args.indexer_types, layers, FULL, SHARED)
    elif args.index_topk_pattern is not None:
        key = "index_topk_pattern"
        types = _from_pattern(key, args.index_topk_pattern, layers)
    else:
        key = "index_skip_topk_offset"
        types = _from_frequency(args.index_topk_freq, args.index_skip_topk_offset, layers)
    if types[0] != FULL:
        check.fail(key, "a schedule that makes the first layer 'full'", getattr(args, key))
    return types


def _from_pattern(key: str, pattern: Any, layers: int) -> list[str]:
    entries = list(pattern) if isinstance(pattern, str) else pattern
    return [
        PATTERN_NAMES[entry] for entry in check.layer_list(key, entries, layers, *PATTERN_NAMES)
    ]


def _from_frequency(freq: Any, offset: Any, layers: int) -> list[str]:
    freq = check.integer("index_topk_freq", 1 if freq is None else freq, 0)
    freq = max(freq, 1)  # transformers reads 0 as 1
    offset = check.integer("index_skip_topk_offset", 2 if offset is None else offset, 0)
    return [FULL if max(i - offset + 1, 0) % freq == 0 else SHARED for i in range(layers)]
