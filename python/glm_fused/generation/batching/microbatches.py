"""The texts of a pipeline in several batches, so that all of its ranks have work at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import CacheList

from ...models.decoder import Model
from ...models.pipeline import turns_of
from ...models.row_caches import side_by_side
from ..drafts.options import DraftOptions
from ..drafts.rows import RowDrafts
from .batch import Batch
from .rows import Row


class MicroBatches:
    """As a `Batch`, but while a step of some texts is at one rank, those of others are at the next.

    A step of all texts is one of each batch in its turn, and all of them are on their way before
    the first is awaited. Which batch a text is in follows from how many each has, so every rank
    has it alike.

    Args:
        model: takes the tokens.
        drafts: which drafts to make; None for none.
        count: how many batches there are.
    """

    def __init__(self, model: Model, drafts: DraftOptions | None, count: int):
        self._batches = [Batch(model, drafts) for _ in range(count)]

    @property
    def rows(self) -> list[Row]:
        """The texts."""
        return [row for batch in self._batches for row in batch.rows]

    @property
    def nbytes(self) -> int:
        """The bytes of the caches, with room to grow."""
        return sum(batch.nbytes for batch in self._batches)

    @property
    def is_ahead(self) -> bool:
        """Whether those that join have to wait for a step on its way, a ``step(ahead=False)``."""
        return self._smallest.is_ahead

    @property
    def _smallest(self) -> Batch:
        return min(self._batches, key=lambda batch: len(batch.rows))

    def join(
        self, rows: Sequence[Row], cache: list[CacheList], drafts: RowDrafts | None = None
    ) -> None:
        """Decode more texts, too, in the batch that has the fewest; see `Batch.join`."""
        self._smallest.join(rows, cache, drafts)

    def leave(self, rows: Sequence[Row]) -> None:
        """Decode these texts no longer."""
        for batch in self._batches:
            batch.leave(rows)

    def abandon(self) -> list[Row]:
        """Let go of all texts, after an error, too; returns them."""
        return [row for batch in self._batches for row in batch.abandon()]

    def cache_of(self, row: Row) -> tuple[list[int], list[CacheList]]:
        """The known tokens of a text that are in a cache, and that; see `Batch.cache_of`."""
        return next(batch for batch in self._batches if row in batch.rows).cache_of(row)

    def step(self, ahead: bool = True) -> list[Row]:
        """One step of all texts; returns those that are over, which have to leave.

        Where ``ahead`` is false it is one of the batch alone that others are to join, and no other
        step of it is on its way afterwards.

        Raises RuntimeError where an expert cannot be read: all that is left then is `abandon`.
        """
        if not ahead:
            return self._smallest.step(ahead=False)
        self._share_out()
        at_work = [batch for batch in self._batches if batch.rows]
        for batch in at_work:
            if not batch.is_ahead:
                batch.begin()
        has_idle, over = len(at_work) < len(self._batches), list[Row]()
        for batch in at_work:
            is_shared_out = has_idle and len(batch.rows) > 1
            over += batch.step(ahead=batch.may_go_ahead() and not is_shared_out)
        return over

    def _share_out(self) -> None:
        """Have batches without texts take half of those of the batch that has the most."""
        for idle in [batch for batch in self._batches if not batch.rows]:
            largest = max(self._batches, key=lambda batch: len(batch.rows))
            if (rows := largest.rows[1::2]) and not largest.is_ahead:
                caches = [largest.cache_of(row)[1] for row in rows]
                largest.leave(rows)
                with mx.stream(generation_stream):
                    unpadded = [0] * len(rows)
                    layers = zip(*caches, strict=True)
                    idle.join(rows, [side_by_side(each, unpadded) for each in layers])

    def describe_drafts(self) -> dict[str, Any] | None:
        """What became of drafts, JSON-ready; None where none are to be made."""
        return self._batches[0].describe_drafts()


def count_of(model: Model, drafts: DraftOptions | None) -> int:
    """How many batches the texts of a model are decoded in."""
    return 1 if drafts else turns_of(model)


def batch_of(model: Model, drafts: DraftOptions | None) -> Batch | MicroBatches:
    """What decodes the texts of a model, so that all ranks which share it have work."""
    count = count_of(model, drafts)
    return Batch(model, drafts) if count == 1 else MicroBatches(model, drafts, count)
