"""Has ranks that share a model take the same steps, which are chosen by how long steps take."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.generate import generation_stream

from ..host import to_numpy
from ..models.decoder import Model
from ..models.line import Line
from ..models.pipeline import StagedModel
from ..models.ranks import Cut, Ranks

_ROW = struct.Struct("<d40s")  # seconds, and what a step is


class Alone:
    """The steps of one process: what it decides, in the time that it measures."""

    def begin(self, what: str, at: int) -> list[mx.array]:
        """A step begins ``at`` a column, which ``what`` describes; returns what to evaluate."""
        return []

    def follow(self, begun: list[mx.array], seconds: float | None = None) -> float | None:
        """The time to count for a step that `begin` gave ``begun`` and took so many seconds."""
        return seconds

    def shared(self, seconds: float) -> float:
        """The time to count for what took so many seconds here, and was awaited."""
        return seconds


class Lockstep(Alone):
    """The steps of several ranks, each of which waits within a step for the others.

    Each step begins with what every rank is about to do, so that one which does something else is
    an error and not a wait for ever. Of a time all count the one of rank 0. While a plain step's
    token is awaited the next one is on its way, so the time of one comes with a later one.
    """

    def __init__(self, tell: Callable[[mx.array], mx.array], numbers: Sequence[int]):
        """``tell`` takes a row and gives [n, bytes], those of ranks ``numbers``, 0 the first."""
        self._tell, self._numbers, self._untold = tell, numbers, math.nan

    @classmethod
    def of_ranks(cls, ranks: Ranks) -> Lockstep:
        """Each compares what all are about to do."""
        cut = Cut.of(ranks.size, ranks.size)
        return cls(lambda row: ranks.gather(row[None], cut, axis=0), range(ranks.size))

    @classmethod
    def of_line(cls, line: Line) -> Lockstep:
        """Each compares what it is about to do with what the first rank is."""
        return cls(lambda row: mx.stack([line.from_first(row), row]), (0, line.rank))

    def begin(self, what: str, at: int) -> list[mx.array]:
        found = self._told(f"{what} at {at}", self._untold)
        self._untold = math.nan
        return [found]

    def follow(self, begun: list[mx.array], seconds: float | None = None) -> float | None:
        """As `Alone.follow`; the time is that of an earlier step.

        Raises RuntimeError where ranks have begun unlike steps.
        """
        (rows,) = begun
        told = self._checked(rows)
        self._untold = math.nan if seconds is None else seconds
        return None if math.isnan(told) else told

    def shared(self, seconds: float) -> float:
        with mx.stream(generation_stream):
            return self._checked(self._told("counts a time", seconds))

    def _told(self, what: str, seconds: float) -> mx.array:
        """What ranks tell, uint8 [n, bytes]."""
        return self._tell(mx.array(list(_ROW.pack(seconds, what.encode())), mx.uint8))

    def _checked(self, rows: mx.array) -> float:
        """The time that rank 0 told, where all tell the same of what they do."""
        (seconds, first), *others = [_ROW.unpack(row.tobytes()) for row in to_numpy(rows)]
        for rank, (_, what) in zip(self._numbers[1:], others, strict=True):
            if what != first:
                here, there = (text.rstrip(b"\0").decode() for text in (first, what))
                raise RuntimeError(
                    f"[shard] ranks must take the same steps: rank 0 {here}, rank {rank} {there}."
                )
        return float(seconds)


def steps_of(model: Model) -> Alone:
    """How the steps of a model are taken, by this process or by all ranks that share it."""
    if isinstance(model, StagedModel):
        return Lockstep.of_line(model.line)
    return Alone() if model.ranks is None else Lockstep.of_ranks(model.ranks)
