"""The ranks that share a model, and how they give each other what they computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

_BITS = {2: mx.uint16, 4: mx.uint32}  # by the size of a float


class Cut(NamedTuple):
    """How many things in a row are shared out among ranks.

    All parts are as long as the longest, so that every rank builds the same graph: where they are
    uneven, some things are in two parts.

    Attributes:
        bounds: where each rank's own begin, and where the last one's end.
        width: how many are in each part.
    """

    bounds: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, count: int, ranks: int, together: int = 1) -> Cut:
        """``count`` things, of which those in each group of ``together`` stay together."""
        groups = count // together
        bounds = tuple(groups * rank // ranks * together for rank in range(ranks + 1))
        return cls(bounds, -(-groups // ranks) * together)

    def part(self, rank: int) -> slice:
        """What the rank has."""
        first = min(self.bounds[rank], self.bounds[-1] - self.width)
        return slice(first, first + self.width)

    def own(self, rank: int) -> slice:
        """What of its part is the rank's own."""
        first = self.bounds[rank] - self.part(rank).start
        return slice(first, first + self.bounds[rank + 1] - self.bounds[rank])


class Ranks:
    """This process among those of a group; its methods make nodes of the lazy graph.

    Each rank waits in a node until all others are there, so they have to come to the same nodes in
    the same order. MLX orders what does not depend on one another by the form of the graph: so all
    ranks build the same, and each node depends on the one that was made before it.

    Attributes:
        rank: the number of this process.
        size: how many there are.
    """

    def __init__(self, group: mx.distributed.Group):
        self.rank: int = group.rank()
        self.size: int = group.size()
        self._group = group
        self._last: mx.array | None = None

    def gather(self, part: mx.array, cut: Cut, axis: int = -1, is_awaited: bool = True) -> mx.array:
        """All ranks' own values, joined along ``axis``, of which each gives its part.

        Nodes that are made later depend on this one if it ``is_awaited``.
        """
        parts = mx.distributed.all_gather(self._next(part[None]), group=self._group)
        self._last = parts if is_awaited else self._last
        at = (slice(None),) * (axis % part.ndim)
        pieces = [parts[rank][*at, cut.own(rank)] for rank in range(self.size)]
        return mx.concatenate(pieces, axis=axis)

    def gather_together(self, parts: Sequence[mx.array], cuts: Sequence[Cut]) -> list[mx.array]:
        """`gather` along the last axis, in one node, of several arrays of one type."""
        rows = mx.concatenate([part.reshape(-1) for part in parts])
        joined = mx.distributed.all_gather(self._next(rows[None]), group=self._group)
        self._last = joined
        found, first = [], 0
        for part, cut in zip(parts, cuts, strict=True):
            of_ranks = joined[:, first : first + part.size].reshape(self.size, *part.shape)
            pieces = [of_ranks[rank, ..., cut.own(rank)] for rank in range(self.size)]
            found.append(mx.concatenate(pieces, axis=-1))
            first += part.size
        return found

    def add_disjoint(self, part: mx.array) -> mx.array:
        """The sum of all ranks' floats, of which all but one rank have zeros in each place.

        Bits are added as integers, which keeps those of negative zeros and of NaN.
        """
        bits = self._next(part.view(_BITS[part.dtype.size]))
        self._last = mx.distributed.all_sum(bits, group=self._group)
        return self._last.view(part.dtype)

    def forget(self) -> None:
        """Let what comes next depend on nothing that was made so far and is not evaluated."""
        self._last = None

    def _next(self, part: mx.array) -> mx.array:
        if self._last is None:
            return part
        ordered: mx.array = mx.depends(part, self._last)
        return ordered
