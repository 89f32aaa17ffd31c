"""What a group's gathers take, at the sizes that a token has them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from .cluster import Link

GATHERED = {  # bytes in a layer of GLM-5.2, in bfloat16 (`glm_fused.models.shard`)
    "heads of attention": 64 * 256 * 2,
    "outputs": 6144 * 2,
    "activations of experts": 9 * 2048 * 2,
}
_SMALL, _LARGE = "a few bytes", "a prompt's"
_CHAIN, _WARM, _ROUNDS = 16, 3, 25  # gathers in a graph, and how often it is evaluated


def measure_links(
    group: mx.distributed.Group, gathered: Mapping[str, int] = GATHERED
) -> dict[str, Any]:
    """How long gathers of so many bytes take; all ranks of the group have to call it.

    Returns ``gathers``, of each its name, the bytes that all ranks have after it, and the fewest
    microseconds that it took, and the ``link`` that fits the smallest and the largest: JSON-ready.
    What else a machine does makes gathers later, and a plan is of the least that a token takes.

    Raises RuntimeError where a rank gets other bytes than another one sent.
    """
    sizes = {_SMALL: 4 * group.size()} | dict(gathered) | {_LARGE: 8 << 20}
    taken: dict[str, list[float]] = {name: [] for name in sizes}
    for number in range(_WARM + _ROUNDS):
        for name, nbytes in sizes.items():
            one = _seconds(group, nbytes)
            if number >= _WARM:
                taken[name].append(one)
    seconds = {name: min(each) for name, each in taken.items()}
    gathers = [
        {"name": name, "bytes": sizes[name], "microseconds": 1e6 * each}
        for name, each in seconds.items()
    ]
    link = link_of(group.size(), sizes[_LARGE], seconds[_SMALL], seconds[_LARGE])
    return {"gathers": gathers, "link": {"latency": link.latency, "rate": link.rate}}


def link_of(ranks: int, nbytes: int, small: float, large: float) -> Link:
    """The link around a ring of ranks on which gathers of next to nothing, and of so many bytes,
    take so many seconds."""
    others = ranks - 1
    moved = nbytes * others / ranks
    return Link(small / others, max(1, round(moved / max(large - small, 1e-9))))


def _seconds(group: mx.distributed.Group, nbytes: int) -> float:
    """The seconds of one gather, of several in a graph, each of which needs the one before."""
    size, rank = group.size(), group.rank()
    length, chain = max(1, nbytes // size), _CHAIN if nbytes < 1 << 20 else 1
    with mx.stream(mx.cpu):
        row = mx.full((length,), rank, mx.uint8)
        mx.eval(row, mx.distributed.all_gather(row[:1], group=group))  # all ranks are here
        began = time.perf_counter()
        for _ in range(chain):
            whole = mx.distributed.all_gather(row[None], group=group)
            row = whole[rank]
        mx.eval(row)
        taken = time.perf_counter() - began
    _check(whole)
    return taken / chain


def _check(whole: mx.array) -> None:
    for rank, row in enumerate(whole):
        if not mx.all(row == rank).item():
            raise RuntimeError(f"[doctor] other bytes came from rank {rank} than it sent.")


def format_links(ranks: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """What `measure_links` gave, and the ranks' machines, as lines for a terminal."""
    lines = [
        f"rank {number:<2}   {rank['host']}: {rank['memory'] / 1e9:.1f} GB of memory, read at"
        f" {rank['read_gb_per_s']:.1f} GB/s"
        for number, rank in enumerate(ranks)
    ]
    for gather in found["gathers"]:
        nbytes = f"{gather['bytes'] / 1024:.1f} KiB"
        lines.append(f"gather    {nbytes:>10} {gather['microseconds']:>9.0f} µs   {gather['name']}")
    link = found["link"]
    return [*lines, f"link      {1e6 * link['latency']:.0f} µs, {link['rate'] / 1e9:.2f} GB/s"]
