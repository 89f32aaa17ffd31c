"""Prompts on their way into a cache, some tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import CacheList

from ...models.cache import size_of, trim
from ...models.decoder import Model
from ...models.row_caches import first_columns, side_by_side
from ...streaming.experts import check_reads
from ..drafts.options import DraftOptions
from ..drafts.rows import RowDrafts
from ..tidying import tidy
from .requests import ScoredToken
from .rows import Row
from .scores import scores

_SCORED = 64  # tokens whose logits are in memory at a time, where prompts are scored


class Prompt(NamedTuple):
    """A text that has not begun, and a cache of its own with the first ``cached`` tokens of it."""

    row: Row
    cache: list[CacheList]
    cached: int

    @property
    def left(self) -> int:
        """How many of its tokens the cache lacks, at least one."""
        return len(self.row.known) - self.cached


class Filling:
    """The prompts of texts that begin together; all tokens of each but the last are to be taken.

    They end in the same column. So where a cache has more of a text than those of the others have
    of theirs, what is beyond that is taken again.

    Attributes:
        rows: the texts.
        cache: theirs.
        drafts: what makes their drafts; None for none.
        left: how many columns of the cache are missing.

    Args:
        model: takes the tokens.
        prompts: of the texts, whose caches are used up.
        drafts: which drafts to make; None for none.
    """

    def __init__(self, model: Model, prompts: Sequence[Prompt], drafts: DraftOptions | None):
        self.rows, self._model = [prompt.row for prompt in prompts], model
        columns = max(prompt.left for prompt in prompts)
        kept = [max(0, len(row.known) - columns) for row in self.rows]
        padding = [max(0, columns - len(row.known)) for row in self.rows]
        self.left = columns - 1
        self.cache = _together([prompt.cache for prompt in prompts], kept, padding)
        self._tokens = [
            [0] * missing + row.known[begun:]
            for missing, begun, row in zip(padding, kept, self.rows, strict=True)
        ]
        self.drafts: RowDrafts | None = None
        if drafts is not None:
            self.drafts = drafts.row_drafts(model, padding)
            self.drafts.start([row.known for row in self.rows])
        for row, cached in zip(self.rows, kept, strict=True):
            row.start(cached)

    def take(self, most: int) -> int:
        """Take up to ``most`` tokens, of all texts together; returns how many there were.

        Raises RuntimeError where an expert cannot be read; nothing of this is of use then.
        """
        first = len(self._tokens[0]) - 1 - self.left
        columns = min(max(1, most // len(self.rows)), self.left)
        last = first + columns
        chunk = mx.array([row[first:last] for row in self._tokens], mx.uint32)
        scored = any(row.scores_prompt for row in self.rows)
        with mx.stream(generation_stream):
            _, hidden = self._model.states(chunk, self.cache)
            primed = []
            if self.drafts is not None and self.drafts.needs_hidden:
                following = mx.array([row[first + 1 : last + 1] for row in self._tokens], mx.uint32)
                primed = self.drafts.prime(following, hidden, scored or columns == self.left)
            mx.eval([layer.state for layer in self.cache], primed, hidden if scored else [])
        check_reads(self.cache)
        tidy(self._model)
        self.left -= columns
        for i, row in enumerate(self.rows):
            found = self._scores(i, first, hidden[i]) if row.scores_prompt else []
            row.fill(max(0, len(row.known) - 1 - self.left), found)
        return columns * len(self.rows)

    def _scores(self, i: int, first: int, hidden: mx.array) -> list[ScoredToken]:
        """The scores of the tokens of text ``i`` that follow columns from ``first`` on."""
        tokens, found = self._tokens[i], list[ScoredToken]()
        # A text that is scored has nothing in its cache when it begins.
        padding, end = len(tokens) - len(self.rows[i].known), first + len(hidden)
        for at in range(max(first, padding), end, _SCORED):
            last = min(at + _SCORED, end)
            following = tokens[at + 1 : last + 1]
            with mx.stream(generation_stream):
                logits = self._model.head(hidden[None, at - first : last - first])[0]
                given = scores(logits, following, self.rows[i].top or 0)
            found += [ScoredToken(t, *one) for t, one in zip(following, given, strict=True)]
        return found

    def cache_of(self, row: Row) -> tuple[list[int], list[CacheList]]:
        """The tokens of a text that were taken, and a cache of them.

        It is the filling's own where the text is alone, which is not filled any more then.
        """
        at, tokens = self.rows.index(row), row.known[: row.cached]
        with mx.stream(generation_stream):
            return tokens, [first_columns(layer, at, len(tokens)) for layer in self.cache]

    @property
    def nbytes(self) -> int:
        """The bytes of the cache, with room to grow."""
        return sum(layer.nbytes for layer in self.cache)


def _together(
    caches: Sequence[list[CacheList]], kept: Sequence[int], padding: Sequence[int]
) -> list[CacheList]:
    """One cache of several, with so many columns of each, where so much padding comes next."""
    for cache, columns in zip(caches, kept, strict=True):
        trim(cache, size_of(cache[0].caches[0]) - columns)
    with mx.stream(generation_stream):
        return [side_by_side(layers, padding) for layers in zip(*caches, strict=True)]
