"""The ranks that share a model, and how they give each other what they computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import mlx.core as mx

Made = TypeVar("Made")

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

    @property
    def is_even(self) -> bool:
        """Whether nothing is in two parts."""
        return self.width * (len(self.bounds) - 1) == self.bounds[-1]

    def part(self, rank: int) -> slice:
        """What the rank has."""
        first = min(self.bounds[rank], self.bounds[-1] - self.width)
        return slice(first, first + self.width)

    def own(self, rank: int) -> slice:
        """What of its part is the rank's own."""
        first = self.bounds[rank] - self.part(rank).start
        return slice(first, first + self.bounds[rank + 1] - self.bounds[rank])


class Traffic(NamedTuple):
    """Gathers that ranks make, and the bytes that each then has of all of them."""

    gathers: int = 0
    bytes: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.gathers - earlier.gathers, self.bytes - earlier.bytes)


class Ranks:
    """This process among those of a group; its methods make nodes of the lazy graph.

    Each rank waits in a node until all others are there, so they have to come to the same nodes in
    the same order. MLX orders what does not depend on one another by the form of the graph: so all
    ranks build the same, and each node depends on the one that was made before it.

    Attributes:
        rank: the number of this process.
        size: how many there are.
        group: that they are the processes of.
        traffic: what they gathered so far, in nodes that were made.
        is_alone: whether this rank waits for no other: see `alone`.
    """

    def __init__(self, group: mx.distributed.Group):
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.traffic = Traffic()
        self.group = group
        self.is_alone = False
        self._last: mx.array | None = None

    def gather(self, part: mx.array, cut: Cut, axis: int = -1, is_awaited: bool = True) -> mx.array:
        """All ranks' own values, joined along ``axis``, of which each gives its part.

        Nodes that are made later depend on this one if it ``is_awaited``.
        """
        return _joined(self._gather(part, is_awaited), part.shape, cut, axis % part.ndim)

    def gather_together(self, parts: Sequence[mx.array], cuts: Sequence[Cut]) -> list[mx.array]:
        """`gather` along the last axis, in one node, of several arrays of one type."""
        if len(parts) == 1:
            return [self.gather(parts[0], cuts[0])]
        rows = mx.concatenate([part.reshape(-1) for part in parts])
        joined = self._gather(rows).reshape(self.size, -1)
        found, first = [], 0
        for part, cut in zip(parts, cuts, strict=True):
            of_ranks = joined[:, first : first + part.size]
            found.append(_joined(of_ranks, part.shape, cut, part.ndim - 1))
            first += part.size
        return found

    def pick(self, rows: mx.array, is_here: mx.array) -> mx.array:
        """Rows [..., dims] of floats, each of the one rank for which ``is_here`` [...] is true.

        Bits are added as integers, which keeps those of negative zeros and of NaN.
        """
        if self.is_alone:
            return rows
        bits = mx.where(is_here[..., None], rows.view(_BITS[rows.dtype.size]), 0)
        self._last = mx.distributed.all_sum(self.follow(bits), group=self.group)
        return self._last.view(rows.dtype)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Have this rank's own parts stand for those of all others, within the block.

        What is made there computes as much as else, but waits for nobody; its values are wrong.
        """
        self.forget()
        self.is_alone = True
        try:
            yield
        finally:
            self.is_alone = False
            self.forget()

    def meet(self) -> None:
        """Wait until all ranks are here."""
        mx.eval(mx.distributed.all_sum(mx.zeros(1), group=self.group, stream=mx.cpu))

    def forget(self) -> None:
        """Let what comes next depend on nothing that was made so far and is not evaluated."""
        self._last = None

    def apart(self, make: Callable[[], Made]) -> tuple[Made, Traffic]:
        """What ``make`` gives of nodes that nobody will evaluate, and what they would gather."""
        kept = self._last, self.traffic
        self._last = None
        try:
            made = make()
            return made, self.traffic - kept[1]
        finally:
            self._last, self.traffic = kept

    def follow(self, array: mx.array) -> mx.array:
        """The array, which now depends on the node that was made last."""
        if self._last is None:
            return array
        ordered: mx.array = mx.depends(array, self._last)
        return ordered

    def made(self, last: mx.array, traffic: Traffic) -> None:
        """Count gathers of a node that is none of these; what comes next depends on ``last``."""
        self.traffic = Traffic(*map(sum, zip(self.traffic, traffic, strict=True)))
        self._last = last

    def _gather(self, part: mx.array, is_awaited: bool = True) -> mx.array:
        """The parts of all ranks, one after the other along the first axis."""
        gathers, nbytes = self.traffic
        self.traffic = Traffic(gathers + 1, nbytes + self.size * part.nbytes)
        part = self.follow(part)
        if self.is_alone:
            parts = mx.concatenate([part] * self.size)
        else:
            parts = mx.distributed.all_gather(part, group=self.group)
        self._last = parts if is_awaited else self._last
        return parts


def _joined(parts: mx.array, shape: Sequence[int], cut: Cut, axis: int) -> mx.array:
    """The values of all ranks along ``axis``, of their parts of a shape, in a row."""
    before, after = shape[:axis], shape[axis + 1 :]
    if not cut.is_even:
        parts = parts.reshape(-1, *shape)
        at = (slice(None),) * axis
        pieces = [parts[rank, *at, cut.own(rank)] for rank in range(parts.shape[0])]
        return mx.concatenate(pieces, axis=axis)
    if math.prod(before) > 1:
        parts = mx.moveaxis(parts.reshape(-1, *shape), 0, axis)
    return parts.reshape(*before, cut.bounds[-1], *after)
