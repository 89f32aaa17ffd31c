"""What each layer of a model is: its attention, its cache, its MLP and its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .. import validation as check

FULL, SHARED = "full", "shared"
DENSE, SPARSE = "dense", "sparse"
DECODER, MTP = "decoder", "mtp"
LATENT, INDEX_KEY = "latent", "index_key"
PATTERN_NAMES = {"F": FULL, "S": SHARED, FULL: FULL, SHARED: SHARED}


class Schedule(Protocol):
    """The keys of a config that say what its layers are; `ModelArgs` has them."""

    model_type: str
    num_hidden_layers: int
    num_nextn_predict_layers: int
    n_routed_experts: int | None
    num_routed_experts_per_layer: list[int] | None
    first_k_dense_replace: int
    moe_layer_freq: int
    mlp_layer_types: list[str] | None
    indexer_types: list[str] | None
    index_topk_pattern: str | list[str] | None
    index_topk_freq: int | None
    index_skip_topk_offset: int | None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer.

    Attributes:
        index: its number; the layers that predict further tokens follow those of the decoder.
        attention: "full" if it runs an indexer of its own, "shared" if it reuses the selection of
            the last full layer.
        cache: what the layer keeps of each token, an entry of its cache each: "latent", the MLA
            latent with its RoPE key, and on full layers "index_key".
        mlp: "dense" or "sparse", which has routed experts.
        experts: how many routed experts it has, 0 where its MLP is dense.
        role: "decoder", or "mtp" for a layer that predicts further tokens.
    """

    index: int
    attention: str
    cache: tuple[str, ...]
    mlp: str
    experts: int
    role: str = DECODER

    @property
    def is_full(self) -> bool:
        """Whether the layer owns an indexer."""
        return self.attention == FULL

    @property
    def is_sparse(self) -> bool:
        """Whether the layer has routed experts."""
        return self.mlp == SPARSE


def layer_specs(args: Schedule) -> tuple[tuple[LayerSpec, ...], tuple[LayerSpec, ...]]:
    """The decoder's layers and those that predict further tokens, from checked args.

    ``args.indexer_types`` and ``args.mlp_layer_types`` have to name every decoder layer. A layer
    that predicts further tokens is full, and sparse where the model has experts.
    """
    assert args.indexer_types is not None and args.mlp_layer_types is not None
    count = args.num_hidden_layers
    numbers = range(count + args.num_nextn_predict_layers)
    attention = [*args.indexer_types, *[FULL] * args.num_nextn_predict_layers]
    mtp_mlp = DENSE if args.n_routed_experts is None else SPARSE
    mlp = [*args.mlp_layer_types, *[mtp_mlp] * args.num_nextn_predict_layers]
    experts = _experts(args, mlp)
    specs = tuple(
        LayerSpec(
            index=i,
            attention=attention[i],
            cache=(LATENT, INDEX_KEY) if attention[i] == FULL else (LATENT,),
            mlp=mlp[i],
            experts=experts[i],
            role=DECODER if i < count else MTP,
        )
        for i in numbers
    )
    return specs[:count], specs[count:]


def _experts(args: Schedule, mlp: list[str]) -> list[int]:
    """The routed experts of each layer: ``num_routed_experts_per_layer``, else all alike."""
    key, given = "num_routed_experts_per_layer", args.num_routed_experts_per_layer
    if given is None:
        return [args.n_routed_experts or 0 if kind == SPARSE else 0 for kind in mlp]
    counts = _one_a_layer(args, key, given)
    for i, (kind, count) in enumerate(zip(mlp, counts, strict=False)):
        check.integer(f"{key}[{i}]", count, 0)
        if kind == DENSE and count:
            check.fail(f"{key}[{i}]", f"0, as layer {i} is dense", count)
        if kind == SPARSE and not count and i < args.num_hidden_layers:
            check.fail(f"{key}[{i}]", f"at least 1, as layer {i} has routed experts", count)
    most = max(counts)
    if most != args.n_routed_experts:
        check.fail("n_routed_experts", f"{most}, the largest of {key}", args.n_routed_experts)
    return [*counts, *[most] * (len(mlp) - len(counts))]  # the list may leave MTP layers out


def _one_a_layer(args: Schedule, key: str, given: Any) -> list[int]:
    """``given``, which is a list with an entry per layer, cut to the layers that the config has.

    Some configs list one more layer, for MTP, than ``num_nextn_predict_layers`` counts.
    """
    count, mtp = args.num_hidden_layers, args.num_nextn_predict_layers
    lengths = (count, count + 1, count + mtp)
    if not isinstance(given, (list, tuple)) or len(given) not in lengths:
        expected = f"a list of {count} entries (num_hidden_layers) and one for the MTP layer"
        if isinstance(given, (list, tuple)):
            expected += f", not {len(given)}"
        check.fail(key, expected, given)
    return list(given[: count + mtp])


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
