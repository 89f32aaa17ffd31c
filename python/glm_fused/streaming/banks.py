"""A model whose routed experts are streamed: options, memory plan, banks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import _ext, ops
from ..checkpoint.folder import Checkpoint
from ..checkpoint.inventory import Manifest
from ..memory import resident_bytes
from ..models.config import ModelArgs
from ..models.decoder import Model
from ..models.moe import MoE
from ..models.tensors import PROJECTIONS
from .budget import PROCESS_GROWTH, Plan, Shares, cache_bytes, make_plan, prompt_bytes
from .experts import StreamedExperts
from .options import StreamOptions
from .pins import check_pins
from .source import ExpertSource, LayerExperts, checkpoint_source

_DTYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}


@dataclass(frozen=True)
class Streaming:
    """The banks of a model and what they were planned from."""

    plan: Plan
    source: ExpertSource
    banks: Mapping[int, _ext.SlotBank]

    def stats(self) -> dict[str, Any]:
        """Sums over all layers: hits, misses, bytes, wait_us, prefetches; and hit_rate."""
        total: dict[str, Any] = {}
        for bank in self.banks.values():
            for key, value in bank.stats().items():
                total[key] = total.get(key, 0) + value
        used = total["hits"] + total["misses"]
        return total | {"hit_rate": total["hits"] / used if used else None}


def find_source(
    checkpoint: Checkpoint, args: ModelArgs, sidecar: str | os.PathLike[str] | None
) -> ExpertSource:
    """The sidecar's experts, checked to be this checkpoint's, or the shards themselves.

    Raises ValueError for a model without routed experts and what either source raises.
    """
    if not any(args.is_sparse(i) for i in range(args.num_hidden_layers)):
        raise ValueError(f"[slots] {checkpoint.path} has no routed experts to stream.")
    if sidecar is None:
        return checkpoint_source(checkpoint, args)
    from .sidecar_identity import sidecar_source

    return sidecar_source(Path(sidecar), checkpoint, args)


def plan_streaming(
    manifest: Manifest,
    args: ModelArgs,
    source: ExpertSource,
    options: StreamOptions,
    kv_format: str,
) -> Plan:
    """Share the budget out; raises ValueError, with the numbers, where it is too small.

    Pins that the model does not have are refused too.
    """
    check_pins(options.pins, {i: layer.experts for i, layer in source.layers.items()})
    dense = sum(
        stored.nbytes * (2 if stored.format == "fp8" else 1)  # becomes bfloat16
        for stored in manifest.stored
        if not stored.source.module.experts
    )
    kv_format = _float_format(manifest) if kv_format == "auto" else kv_format
    layers = [layer.expert_bytes for layer in source.layers.values()]
    process = resident_bytes() + PROCESS_GROWTH
    buffers = _buffer_bytes(args, layers, options)

    def shares(context: int) -> Shares:
        staging = buffers + prompt_bytes(args, context)
        return Shares(process, dense, cache_bytes(args, context, kv_format), staging)

    return make_plan(args, shares, layers, options)


def _buffer_bytes(args: ModelArgs, layers: Sequence[int], options: StreamOptions) -> int:
    """Of reads past the page cache, in whole blocks, and of the policy."""
    block = 4096
    reads = options.depth * (min(options.split, max(layers)) + 2 * block) if options.direct else 0
    followers = 4 * len(layers) * (args.n_routed_experts or 0) ** 2
    return reads + (followers if options.policy == "learned" else 0)


def _float_format(manifest: Manifest) -> str:
    """The format of the activations, which are of the embedding's type."""
    kinds = {str(s.format) for s in manifest.stored if s.source.kind in ("norms", "embedding")}
    return "fp32" if "F32" in kinds else "bf16"


def attach_banks(
    model: Model, args: ModelArgs, source: ExpertSource, plan: Plan, options: StreamOptions
) -> Streaming:
    """Put a bank in the place of every layer's experts.

    Raises RuntimeError, naming the file, for one that does not open or has another size, and
    ValueError for options that do not fit.
    """
    paths, sizes = [str(path) for path in source.files], list(source.files.values())
    files = _ext.SlotFiles(paths, sizes, options.direct)
    reader = _ext.SlotReader(options.depth, options.split)
    banks: dict[int, _ext.SlotBank] = {}
    last: StreamedExperts | None = None
    for i, layer in source.layers.items():
        bank = banks[i] = _ext.slot_bank(
            reader,
            files,
            i,
            [(list(part.shape), _DTYPES[part.dtype]) for part in layer.parts],
            list(layer.locations),
            list(layer.checksums),
            plan.slots,
            options.spares,
            options.policy,
            list(options.pins.get(i, ())),
            options.patience,
        )
        if bank.capacity < args.num_experts_per_tok:
            raise ValueError(
                f"[slots] layer {i}: {plan.slots} slots less {options.spares} spare and"
                f" {len(options.pins.get(i, ()))} pinned ones leave {bank.capacity}, a token needs"
                f" {args.num_experts_per_tok}."
            )
        moe = model.layers[i].mlp
        assert isinstance(moe, MoE)
        moe.switch_mlp = StreamedExperts(bank, layer.experts, _weights(bank, layer, args))
        if last is not None and options.spares:
            last.look_ahead(moe.gate, moe.switch_mlp)
        last = moe.switch_mlp
    return Streaming(plan, source, banks)


def _weights(
    bank: _ext.SlotBank, layer: LayerExperts, args: ModelArgs
) -> tuple[ops.Weight, ops.Weight, ops.Weight]:
    arrays = dict(zip((part.name for part in layer.parts), bank.arrays, strict=True))

    def form(projection: str) -> ops.Weight:
        down = projection == "down_proj"
        columns = args.moe_intermediate_size if down else args.hidden_size
        weight, scales = arrays[f"{projection}.weight"], arrays.get(f"{projection}.scales")
        fmt = layer.format(projection, columns)
        if fmt is None:
            return ops.Weight(weight)
        biases = arrays.get(f"{projection}.biases")
        return ops.Weight(weight, scales, biases, fmt.group_size, fmt.bits, fmt.mode)

    gate, up, down = (form(projection) for projection in PROJECTIONS)
    return gate, up, down
