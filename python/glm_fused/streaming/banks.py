"""A model whose routed experts are streamed: options, memory plan, banks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from .. import _ext, ops
from ..checkpoint.folder import Checkpoint
from ..checkpoint.safetensors_header import DTYPES
from ..checkpoint.stored import Inventory
from ..formats.kv_rows import FLOATS
from ..formats.weights import Format, plane_names
from ..memory import resident_bytes
from ..models.config import ModelArgs
from ..models.decoder import Model
from ..models.layer_spec import DECODER, LayerSpec
from ..models.line import Line
from ..models.moe import MoE
from ..models.pipeline import Stage, own_limit
from ..models.prompt_memory import cache_bytes, chunk_bytes
from ..models.ranks import Cut, Ranks
from ..models.shard import Sharding
from ..models.tensors import PROJECTIONS
from .budget import (
    PROCESS_GROWTH,
    LayerSlots,
    Plan,
    Shares,
    make_plan,
)
from .experts import StreamedExperts
from .flashmoe import is_flashmoe
from .options import StreamOptions
from .pins import check_pins
from .source import ExpertSource, LayerExperts, checkpoint_source

Share = Sharding | Stage
_ANY = 2**31 - 1  # tokens
_COUNTS = ("hits", "misses", "bytes", "wait_us", "prefetches")


@dataclass(frozen=True)
class Streaming:
    """The banks of a model and what they were planned from.

    ``tokens_at_once`` is how many tokens have slots for all their experts in every layer, whichever
    rank has it; None stands for any number.
    """

    plan: Plan
    source: ExpertSource
    banks: Mapping[int, _ext.SlotBank]
    tokens_at_once: int | None

    def stats(self) -> dict[str, Any]:
        """The sums over all layers of hits, misses, bytes, wait_us and prefetches, and hit_rate."""
        total: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
        for bank in self.banks.values():
            for key, value in bank.stats().items():
                total[key] += value
        used = total["hits"] + total["misses"]
        return total | {"hit_rate": total["hits"] / used if used else None}


def find_source(
    checkpoint: Checkpoint,
    args: ModelArgs,
    sidecar: str | os.PathLike[str] | None,
    share: Share | None = None,
) -> ExpertSource:
    """The sidecar's experts, checked to be this checkpoint's, or the checkpoint's own files.

    An MTP layer that the sidecar does not have is read from the checkpoint. With the ``share`` of
    one of several ranks they are its experts, or its rows of all.

    Raises ValueError for a model without routed experts, for rows of a sidecar that has checksums,
    and whatever either source raises.
    """
    if not any(layer.is_sparse for layer in args.layers):
        raise ValueError(f"[slots] {checkpoint.path} has no routed experts to stream.")
    every = args.model_layers
    layers = [la for la in every if share is None or share.has(f"model.layers.{la.index}.")]
    if sidecar is None:
        source = checkpoint_source(checkpoint, args, layers)
    else:
        source = _packed(checkpoint, args, Path(sidecar), layers, isinstance(share, Sharding))
    return source.part(args, share.parts()) if isinstance(share, Sharding) else source


def _packed(
    checkpoint: Checkpoint,
    args: ModelArgs,
    sidecar: Path,
    layers: Sequence[LayerSpec],
    in_rows: bool,
) -> ExpertSource:
    """The experts of some layers in a sidecar, of which ranks may have rows."""
    from .sidecar_identity import flashmoe_source, sidecar_source

    if in_rows and not is_flashmoe(sidecar):
        raise ValueError(
            f"[shard] sidecar {sidecar} has checksums of whole experts, of which a rank that has"
            " rows reads a part; expected ranks that have layers (pipeline)."
        )
    of_kind = flashmoe_source if is_flashmoe(sidecar) else sidecar_source
    packed = of_kind(sidecar, checkpoint, args, {layer.index for layer in layers})
    others = [layer for layer in layers if layer.index not in packed.layers]
    return packed.joined(checkpoint_source(checkpoint, args, others))


def plan_streaming(
    inventory: Inventory,
    args: ModelArgs,
    source: ExpertSource,
    options: StreamOptions,
    kv_format: str,
    prefill_step_size: int | None = None,
    share: Share | None = None,
) -> Plan:
    """Share the budget out between weights, cache, slots and buffers, and a chunk of a prompt.

    With ``share`` it is that of one of several ranks, whose experts ``source`` has.

    Raises ValueError, with the numbers, where it is too small, and for pins of experts that the
    model does not have.
    """
    check_pins(options.pins, {la.index: la.experts for la in args.model_layers if la.is_sparse})
    dense = sum(
        round(stored.loaded * (1.0 if share is None else share.share(module.path)))
        for stored in inventory.stored
        if not (module := stored.source.module).experts
    )
    ranks = share.ranks.size if isinstance(share, Sharding) else 1
    own = share.own_args() if isinstance(share, Stage) else args
    floats = inventory.float_format
    kv_format = floats if kv_format == "auto" else kv_format
    float_bytes = FLOATS[floats].size
    layers = [LayerSlots(layer.experts, layer.expert_bytes) for layer in source.layers.values()]
    process = resident_bytes() + PROCESS_GROWTH
    buffers = _buffer_bytes(layers, options)
    prompts = options.prompts
    if isinstance(share, Stage):
        prompts = own_limit(prompts, kv_format, own, args)

    def shares(context: int, step: int) -> Shares:
        staging = buffers + chunk_bytes(own, step, context, float_bytes, bool(layers), ranks)
        cache = cache_bytes(own, context, kv_format)
        return Shares(process, dense, cache, staging, prompts)

    return make_plan(args, shares, layers, options, prefill_step_size)


def _buffer_bytes(layers: Sequence[LayerSlots], options: StreamOptions) -> int:
    """The bytes of buffers: of reads past the page cache, in whole blocks, and of the policy."""
    block, largest = 4096, max((layer.expert_bytes for layer in layers), default=0)
    reads = options.depth * (min(options.split, largest) + 2 * block) if options.direct else 0
    followers = 4 * sum(layer.experts**2 for layer in layers)
    return reads + (followers if options.policy == "learned" else 0)


def attach_banks(
    model: Model,
    args: ModelArgs,
    source: ExpertSource,
    plan: Plan,
    options: StreamOptions,
    formats: Mapping[str, Format],
    share: Share | None = None,
) -> Streaming:
    """Put a bank in the place of every layer's experts; ``formats`` are those of packed modules.

    With a ``share`` ranks share the model, each with banks of its own, and make the same call.

    Raises RuntimeError, naming the file, for a file that does not open or has another size, and
    ValueError for options that do not fit.
    """
    paths, sizes = [str(path) for path in source.files], list(source.files.values())
    files = _ext.SlotFiles(paths, sizes, options.direct)
    reader = _ext.SlotReader(options.depth, options.split)
    banks: dict[int, _ext.SlotBank] = {}
    top_k = args.num_experts_per_tok
    for i, layer in source.layers.items():
        slots = min(plan.slots, layer.experts)
        spares = min(options.spares, max(slots - top_k, 0))  # a small layer has fewer to spare
        bank = banks[i] = _ext.slot_bank(
            reader,
            files,
            i,
            [(list(part.shape), DTYPES[part.dtype]) for part in layer.parts],
            list(layer.locations),
            list(layer.checksums),
            slots,
            spares,
            options.policy,
            list(options.pins.get(i, ())),
            options.patience,
        )
        if bank.capacity < top_k:
            raise ValueError(
                f"[slots] layer {i}: {slots} slots less {spares} spare and"
                f" {len(options.pins.get(i, ()))} pinned ones leave {bank.capacity}, a token needs"
                f" {top_k}."
            )
    rooms = _rooms(banks, share.ranks if isinstance(share, Sharding) else None)
    last: StreamedExperts | None = None
    for i, layer in source.layers.items():
        moe = model.model.layers[i].mlp
        assert isinstance(moe, MoE)
        weights = _weights(i, banks[i], layer, formats)
        moe.switch_mlp = StreamedExperts(banks[i], layer.experts, weights, rooms[i])
        # What a decoder layer is given says nothing of what the MTP layer's router will choose.
        if last is not None and options.spares and args.model_layers[i].role == DECODER:
            last.look_ahead(moe.gate, moe.switch_mlp)
        last = moe.switch_mlp
    fit = [rooms[i] // top_k for i, layer in source.layers.items() if rooms[i] < layer.experts]
    at_once = min(fit, default=_ANY)
    if isinstance(share, Stage):
        assert isinstance(share.line, Line)
        at_once = share.line.least(at_once)
    return Streaming(plan, source, banks, None if at_once == _ANY else at_once)


def _rooms(banks: Mapping[int, _ext.SlotBank], ranks: Ranks | None) -> dict[int, int]:
    """How many experts the bank of each layer holds, of the rank that holds the fewest."""
    capacities = [bank.capacity for bank in banks.values()]
    if ranks is not None:
        each = ranks.gather(mx.array([capacities]), Cut.of(ranks.size, ranks.size), axis=0)
        capacities = cast(list[int], mx.min(each, axis=0).tolist())
    return dict(zip(banks, capacities, strict=True))


def _weights(
    index: int, bank: _ext.SlotBank, layer: LayerExperts, formats: Mapping[str, Format]
) -> tuple[ops.Weight, ops.Weight, ops.Weight]:
    arrays = dict(zip((part.name for part in layer.parts), bank.arrays, strict=True))

    def form(projection: str) -> ops.Weight:
        fmt = formats.get(f"model.layers.{index}.mlp.switch_mlp.{projection}")
        if fmt is None:
            return ops.Weight.dense(arrays[f"{projection}.weight"])
        return ops.Weight([arrays[f"{projection}.{name}"] for name in plane_names(fmt)], fmt)

    gate, up, down = (form(projection) for projection in PROJECTIONS)
    return gate, up, down
