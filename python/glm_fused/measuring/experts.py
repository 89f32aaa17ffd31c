"""Routed experts: memory bandwidth, a bank's last slot, and experts that are read from disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import _ext, ops
from ..formats.weights import FORMATS, Weight
from ..host import to_numpy
from ..models.config import ModelArgs
from ..selftest.backends import CPU
from ..selftest.benchmark import RoutedExperts, read_bandwidth
from ..streaming.experts import StreamedExperts
from .subject import Size
from .timing import seconds

SLOTS = 256
_CALLS = 4  # evaluated together, as successive layers are


def bandwidth(size: Size, yardstick_bytes: int = 512 << 20) -> dict[str, float]:
    """GB/s of weights that `ops.moe_decode` reads, dense so that it decodes none, and of others.

    ``mx_sum`` is MLX's reduction, ``plain`` what reports call plain streaming reads.
    """
    args = ModelArgs.from_dict(size.config)
    with CPU.active():
        yardstick = mx.zeros((yardstick_bytes // 4,), mx.uint32)
        hidden, intermediate = args.hidden_size, args.moe_intermediate_size
        layer = RoutedExperts(FORMATS["bf16"], hidden=hidden, intermediate=intermediate)
        mx.eval(yardstick)
    routes = [layer.route() for _ in range(_CALLS)]
    taken = seconds(lambda: [layer.fused(*route) for route in routes]) / _CALLS
    summed = seconds(lambda: mx.sum(yardstick))
    return {
        "moe_decode": layer.top_k * layer.expert_bytes / taken / 1e9,
        "mx_sum": yardstick.nbytes / summed / 1e9,
        "plain": read_bandwidth(yardstick),
    }


def last_slot(size: Size) -> dict[str, Any]:
    """Whether an expert gives the same bits in slot 255 of 256 as alone."""
    args = ModelArgs.from_dict(size.config)
    with CPU.active():
        one = RoutedExperts(
            FORMATS["affine4"],
            hidden=args.hidden_size,
            intermediate=args.moe_intermediate_size,
            bank=1,
            top_k=1,
        )
        scores = mx.ones((1, 1))
        gate, up, down = _as_last(one.gate), _as_last(one.up), _as_last(one.down)
        mx.eval(scores, gate, up, down)
    alone = one.fused(mx.array([[0]], mx.int32), scores)
    last = ops.moe_decode(one.x, gate, up, down, mx.array([[SLOTS - 1]], mx.int32), scores)
    same = mx.array_equal(alone.view(mx.uint16), last.view(mx.uint16)).item()
    return {"slots": SLOTS, "same_bits": bool(same)}


def _as_last(weight: Weight) -> Weight:
    """The weight behind 255 of zeros."""

    def behind(plane: mx.array) -> mx.array:
        return mx.concatenate([mx.zeros((SLOTS - 1, *plane.shape[1:]), plane.dtype), plane])

    return weight._replace(planes=[behind(plane) for plane in weight.planes])


def streaming(size: Size, folder: Path | None = None) -> list[dict[str, Any]]:
    """``us`` of a layer's streamed experts, where all are in slots and where all are read.

    The file of 16 experts is written to ``folder``, else where temporary files are; reads go past
    the page cache. ``mb`` are read by a call.
    """
    args = ModelArgs.from_dict(size.config)
    with CPU.active(), tempfile.TemporaryDirectory(dir=folder) as name:
        layer = RoutedExperts(
            FORMATS["affine4"], hidden=args.hidden_size, intermediate=args.moe_intermediate_size
        )
        experts, bank = _streamed(layer, Path(name) / "experts.bin")
    half = layer.bank // 2
    scores = mx.ones((1, half)) / half
    hit, turns = mx.arange(half, dtype=mx.int32)[None], _alternating(half)
    mx.eval(scores, hit)

    def call(chosen: mx.array) -> mx.array:
        return experts(layer.x, chosen, scores, mx.zeros_like)[0]

    rows = []
    for what, build in (
        ("all hits", lambda: call(hit)),
        ("all reads", lambda: call(next(turns))),
    ):
        before = bank.stats()
        taken = seconds(build, repeats=6)
        read = (bank.stats()["bytes"] - before["bytes"]) / 7 / 1e6
        rows.append({"what": what, "us": 1e6 * taken, "mb": read})
    return rows


def _streamed(layer: RoutedExperts, file: Path) -> tuple[StreamedExperts, _ext.SlotBank]:
    """The layer's experts from a file, in half as many slots."""
    weights = layer.gate, layer.up, layer.down
    planes = [plane for weight in weights for plane in weight.planes]
    parts, locations = [], []
    with file.open("wb") as out:
        for expert in range(layer.bank):
            for plane in planes:
                locations.append((0, out.tell()))
                out.write(to_numpy(plane[expert].view(mx.uint8)).tobytes())
    for plane in planes:
        parts.append((list(plane.shape[1:]), plane.dtype))
    files = _ext.SlotFiles([str(file)], [file.stat().st_size], True)
    slots = layer.bank // 2
    bank = _ext.slot_bank(
        _ext.SlotReader(8, 1 << 20), files, 0, parts, locations, [], slots, 0, "lru", [], 60.0
    )
    arrays = iter(bank.arrays)
    gate, up, down = (
        Weight([next(arrays) for _ in weight.planes], weight.format) for weight in weights
    )
    return StreamedExperts(bank, layer.bank, (gate, up, down), bank.capacity), bank


def _alternating(half: int) -> Iterator[mx.array]:
    """Requests for the first and the second half of the experts in turn."""
    while True:
        for first in (half, 0):
            chosen = mx.arange(first, first + half, dtype=mx.int32)[None]
            mx.eval(chosen)
            yield chosen
