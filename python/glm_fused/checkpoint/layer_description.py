"""What runs a decoded token in each layer of a checkpoint, and what the token reads there."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from textwrap import wrap
from typing import Any

from ..models.config import ModelArgs
from ..models.decode_routes import path_taken
from ..models.layer_spec import LayerSpec
from ..models.tensor_names import layer_of
from ..models.tensors import PROJECTIONS, Module
from .stored import FP8_AS_BF16, Inventory, Stored

IN_MEMORY = "memory"
_JOINED = "experts gate, up"  # the kind of a tensor that two projections share


def activity(args: ModelArgs, module: Module) -> float:
    """The share of a module's weights that one token uses."""
    if module.experts:
        return args.num_experts_per_tok / module.experts
    if module.kind == "embedding" and not args.tie_word_embeddings:
        return 1 / args.vocab_size
    return 1.0


def describe_layers(
    args: ModelArgs, inventory: Inventory, source: str = IN_MEMORY, slots: int | None = None
) -> list[dict[str, Any]]:
    """For each layer which code runs it, the formats of its MLP, and the bytes a token reads.

    ``source`` says where routed experts are, and ``slots`` how many of a streamed layer's have a
    place in memory, None where that is not planned. What a token reads of streamed experts is in
    slots by then; of the disk it reads as much at most.
    """
    layers = [_layer(args, layer, source, slots) for layer in args.model_layers]
    for stored in inventory.stored:
        module = stored.source.module
        index = layer_of(module.path)
        if index is None:
            continue
        nbytes = stored.loaded * activity(args, module)
        layers[index]["bytes_read_per_token"] += nbytes
        if module.experts:
            layers[index]["expert_bytes_per_token"] += nbytes
        _, _, projection = module.path.rpartition(".")
        if projection in PROJECTIONS and "shared_experts" not in module.path:
            names = ("gate", "up") if stored.source.kind == _JOINED else (projection[:-5],)
            layers[index]["formats"] |= dict.fromkeys(names, _loaded(stored))
    for layer in layers:
        for key in ("bytes_read_per_token", "expert_bytes_per_token"):
            layer[key] = round(layer[key])
    return layers


def _layer(args: ModelArgs, spec: LayerSpec, source: str, slots: int | None) -> dict[str, Any]:
    streamed = spec.is_sparse and source != IN_MEMORY
    return {
        "layer": spec.index,
        "attention": spec.attention,
        "path": path_taken(args, [spec]),
        "experts": spec.experts,
        "experts_from": source if spec.is_sparse else None,
        "slots": min(slots, spec.experts) if streamed and slots is not None else None,
        "formats": {},
        "bytes_read_per_token": 0.0,
        "expert_bytes_per_token": 0.0,
    }


def _loaded(stored: Stored) -> str:
    return "bf16" if stored.format == FP8_AS_BF16 else str(stored.format)


def format_layers(layers: list[dict[str, Any]], width: int) -> list[str]:
    """The layers as lines for a terminal, those that are alike in one."""

    first: dict[tuple[str, int], list[int]] = {}
    for layer in layers:
        alike = what_runs(layer), layer["bytes_read_per_token"]
        first.setdefault(alike, []).append(layer["layer"])
    lines = [f"  {'layers':<14}{'a token':>11}  path, attention, MLP: gate/up/down"]
    for (text, nbytes), numbers in first.items():
        lines.append(f"  {'':<14}{decimal(nbytes):>11}  {text}")
        names = wrap(ranges(numbers), width - 4)
        if len(names[0]) < 14 and len(names) == 1:
            lines[-1] = f"  {names[0]:<14}" + lines[-1][16:]
        else:
            lines[-1:-1] = [f"  {name}" for name in names]
    return lines


def what_runs(layer: dict[str, Any]) -> str:
    """Which code runs a layer that `describe_layers` gave, its attention, experts and formats."""
    formats = "/".join(layer["formats"][name] for name in ("gate", "up", "down"))
    return f"{layer['path']}, {layer['attention']}, {_experts(layer)}: {formats}"


def _experts(layer: dict[str, Any]) -> str:
    count, source, slots = layer["experts"], layer["experts_from"], layer["slots"]
    if source is None:
        return "dense"
    if source == IN_MEMORY:
        return f"{count} experts in memory"
    most = f"up to {decimal(layer['expert_bytes_per_token'])} a token"
    into = "" if slots is None else f" into {slots} slots"
    return f"{count} experts streamed from {source}{into}, {most}"


def ranges(indices: Iterable[int]) -> str:
    """ "0-2, 6, 10": consecutive numbers joined."""
    runs = [
        [n for _, n in run]
        for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def decimal(n: int) -> str:
    """``n`` bytes, with their unit."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"
