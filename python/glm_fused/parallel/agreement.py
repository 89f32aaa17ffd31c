"""What the ranks of a group tell each other before they begin, and that it fits together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..host import to_numpy
from ..validation import show
from .interrupts import ending_at_interrupts
from .meeting import meeting


def join_group() -> mx.distributed.Group:
    """The group that this process was started in, which ends where the others do not come.

    Raises ValueError where there are no other processes in it.
    """
    try:
        with ending_at_interrupts(), meeting():
            group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise ValueError(f"[shard] {_HOW}: {error}") from None
    if group.size() < 2:
        raise ValueError(f"[shard] {_HOW}; this is a single process.")
    return group


_HOW = "start several processes with mlx.launch, as in mlx.launch -n 2 glm-fused generate …"


def tell(group: mx.distributed.Group, text: str) -> list[str]:
    """What each rank tells the others, in their order; all have to call it."""
    data = text.encode()
    sizes = _gather(group, mx.array([len(data)], mx.uint32))[:, 0]
    padded = data.ljust(int(sizes.max()) or 1)
    rows = _gather(group, mx.array(list(padded), mx.uint8))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def _gather(group: mx.distributed.Group, row: mx.array) -> np.ndarray[Any, Any]:
    with mx.stream(mx.cpu):
        return to_numpy(mx.distributed.all_gather(row[None], group=group))


def agree(group: mx.distributed.Group, described: Mapping[str, Any]) -> None:
    """Have all ranks compare what must be the same; each raises the same error.

    Raises ValueError, naming the first thing that differs, with what two ranks have.
    """
    first, *others = (json.loads(text) for text in tell(group, json.dumps(described, default=str)))
    for rank, other in enumerate(others, start=1):
        for key in dict.fromkeys((*first, *other)):
            if first.get(key) != other.get(key):
                here, there = show(first.get(key)), show(other.get(key))
                raise ValueError(
                    f"[shard] {key} must be the same for all: rank 0 has {here}, rank {rank}"
                    f" {there}."
                )
