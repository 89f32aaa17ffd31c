"""Several texts at once, with or without drafts, each with the tokens that it has alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import CacheList

from ...host import settle
from ...models.cache import trim
from ...models.decoder import Model
from ...models.pipeline import turns_of
from ...models.row_caches import first_columns, joined, kept
from ...ops.blocks import MAX_TOKENS
from ...streaming.experts import check_reads
from .. import choice
from ..drafts.depth import Depth, Plan
from ..drafts.experience import Experience
from ..drafts.options import DraftOptions
from ..drafts.rows import RowDrafts
from ..drafts.statistics import Statistics
from ..lockstep import Alone, steps_of
from ..tidying import tidy
from .rows import Row

_TIDY = 256  # steps after which MLX lets go of memory that it keeps


class _Ahead(NamedTuple):
    """A plain step on its way: the tokens, uint32 [b, 1], and logits [b, 1, vocabulary]."""

    tokens: mx.array
    logits: mx.array
    hidden: mx.array | None
    begun: list[mx.array]


class Batch:
    """Decodes texts side by side; more may join them after any step, and any may leave.

    Of a step's drafts every text keeps what is right. The cache keeps the columns that all have
    got; what a text has got besides is known, and takes the place of drafts in the next step. So
    no text waits for another to be checked, and nothing is moved within a cache.

    Without drafts, while the tokens of a step are awaited the next step is on its way already.

    Attributes:
        rows: the texts.
        statistics: what became of drafts.

    Args:
        model: takes the tokens.
        drafts: which drafts to make; None for none.
    """

    def __init__(self, model: Model, drafts: DraftOptions | None):
        self.rows: list[Row] = []
        self.statistics = Statistics()
        self._model, self._options = model, drafts
        self._lockstep = Alone() if drafts is None else steps_of(model)
        self._cache: list[CacheList] = []
        self._drafts: RowDrafts | None = None
        self._depths: dict[int, Depth] = {}  # for each number of texts
        self._ahead: _Ahead | None = None
        self._steps = 0

    @property
    def nbytes(self) -> int:
        """The bytes of the cache, with room to grow."""
        return sum(layer.nbytes for layer in self._cache)

    @property
    def is_ahead(self) -> bool:
        """Whether a step is on its way already, whose tokens nobody has seen."""
        return self._ahead is not None

    def join(
        self, rows: Sequence[Row], cache: list[CacheList], drafts: RowDrafts | None = None
    ) -> None:
        """Decode more texts, too, whose prompts are in a ``cache``, and what makes their drafts.

        No step may be on its way: the last one was a ``step(ahead=False)``.
        """
        assert not self.is_ahead
        if self.rows:
            with mx.stream(generation_stream):
                for i, layer in enumerate(cache):
                    self._cache[i] = joined(self._cache[i], layer)
                if self._drafts is not None and drafts is not None:
                    self._drafts.join(drafts)
        else:
            self._cache, self._drafts = cache, drafts
        self.rows += rows

    def leave(self, rows: Sequence[Row]) -> None:
        """Decode these texts no longer."""
        stay = [i for i, row in enumerate(self.rows) if row not in rows]
        if len(stay) == len(self.rows):
            return
        if not stay:
            self.abandon()
            return
        self.rows = [self.rows[i] for i in stay]
        with mx.stream(generation_stream):
            for i, layer in enumerate(self._cache):
                self._cache[i] = kept(layer, stay)
            if self._drafts is not None:
                self._drafts.filter(stay)
            if (ahead := self._ahead) is not None:
                at = mx.array(stay)
                hidden = None if ahead.hidden is None else ahead.hidden[at]
                self._ahead = _Ahead(ahead.tokens[at], ahead.logits[at], hidden, ahead.begun)

    def abandon(self) -> list[Row]:
        """Let go of all texts, after an error, too; returns them."""
        if self._ahead is not None:
            settle(generation_stream)
        rows, self.rows, self._cache = self.rows, [], []
        self._ahead = self._drafts = None
        return rows

    def cache_of(self, row: Row) -> tuple[list[int], list[CacheList]]:
        """The known tokens that are in the cache, and a cache of them.

        It is the batch's own where the text is alone, which has to leave then.
        """
        at, tokens = self.rows.index(row), row.known[: row.cached]
        with mx.stream(generation_stream):
            return tokens, [first_columns(layer, at, len(tokens)) for layer in self._cache]

    def begin(self) -> None:
        """Have a step on its way, without drafts, that takes the known tokens, one of each text."""
        self._ahead = self._launch_known()

    def step(self, ahead: bool = True) -> list[Row]:
        """One step of all texts; returns those that are over, which have to leave.

        Where ``ahead`` is false no other step is on its way after it.

        Raises RuntimeError where an expert cannot be read: all that is left then is `abandon`.
        """
        began = time.perf_counter()
        depth, plan = self._depth(), self._next_drafts()
        steady = self._ahead is not None
        if steady or (plan is None and self.may_go_ahead()):
            plan, (advanced, begun) = None, self._plain(plan is None and ahead)
        else:
            (advanced, begun), steady = self._round(plan.depth if plan else 0), True
        check_reads(self._cache)
        seconds = time.perf_counter() - began
        self.statistics.count(advanced, seconds)
        if plan is not None and depth is not None:
            self.statistics.count_drafts(plan.kind.source, plan.depth, advanced - 1)
            depth.count(plan, advanced - 1, self._lockstep.shared(seconds))
        elif depth is not None:
            depth.count_plain(self._lockstep.follow(begun, seconds if steady else None))
        self._steps += 1
        if self._steps % _TIDY == 0:
            tidy(self._model)
        return [row for row in self.rows if row.over]

    def describe_drafts(self) -> dict[str, Any] | None:
        """What became of drafts, JSON-ready; None where none are to be made."""
        if self._options is None:
            return None
        depth = self._depths.get(1) or next(iter(self._depths.values()), None)
        plain = None if depth is None else depth.plain_seconds
        return self._options.describe() | self.statistics.describe(plain)

    def _depth(self) -> Depth | None:
        """What decides about drafts of so many texts: a step of others has other costs."""
        if self._options is None:
            return None
        count = len(self.rows)
        if count not in self._depths:
            experience = None if count == 1 else Experience()
            self._depths[count] = self._options.chooser(self._model, experience)
        return self._depths[count]

    def _next_drafts(self) -> Plan | None:
        depth = self._depth()
        if self._drafts is None or depth is None:
            return None
        columns = self._model.context - self._cache[0].size()
        left = max(row.left for row in self.rows)
        most = min(left, columns, MAX_TOKENS // len(self.rows)) - 1
        return depth.next(self._drafts.kinds(), most)

    def may_go_ahead(self) -> bool:
        """Whether a step's tokens can be the next one's before anybody has seen them."""
        return all(row.constraint is None and len(row.ahead) == 1 for row in self.rows)

    def _plain(self, more: bool) -> tuple[int, list[mx.array]]:
        """A step without drafts, as `_round`; with ``more`` the one after it is on its way then."""
        now, self._ahead = self._ahead or self._launch_known(), None
        room = self._model.context > self._cache[0].size()
        if more and room and any(row.left > 1 for row in self.rows):
            self._ahead = self._launch(now.tokens, known=False)
        mx.eval(now.tokens)
        new = cast(list[list[int]], now.tokens.tolist())
        for i, row in enumerate(self.rows):
            row.cached += 1
            row.extend(now.logits[i] if row.needs_logits else None, (), new[i])
        self._extend_drafts(new, new, now.hidden)
        return 1, now.begun

    def _launch_known(self) -> _Ahead:
        return self._launch(mx.array([row.ahead for row in self.rows], mx.uint32), known=True)

    def _launch(self, tokens: mx.array, known: bool) -> _Ahead:
        """A plain step that takes a token [b, 1] of each text, the next after those ``known``."""
        with mx.stream(generation_stream):
            begun = self._lockstep.begin("takes a plain step", self._cache[0].size())
            logits, hidden = self._forward(tokens)
            chosen = self._chosen(logits, None if known else tokens)
            if turns_of(self._model) == 1:  # else the next batch's step is to begin before
                mx.async_eval(chosen, logits, [] if hidden is None else hidden, begun)
        return _Ahead(chosen, logits, hidden, begun)

    def _chosen(self, logits: mx.array, ahead: mx.array | None) -> mx.array:
        """What each text goes on with, uint32 [b, 1], of logits [b, 1, vocabulary].

        It follows the tokens ``ahead`` [b, 1], if any, of the known ones.
        """
        likeliest = mx.argmax(logits, axis=-1)
        if all(row.takes_likeliest for row in self.rows):
            return likeliest
        # Processors change what they are given in place, so each gets logits of its own.
        return mx.stack(
            [
                likeliest[i]
                if row.takes_likeliest
                else row.choice.next(logits[i], () if ahead is None else (ahead[i],))
                for i, row in enumerate(self.rows)
            ]
        )

    def _round(self, depth: int) -> tuple[int, list[mx.array]]:
        """One step with so many drafts; returns by how many columns the cache has grown."""
        width = 1 + depth
        sure = [row.ahead[:width] for row in self.rows]
        with mx.stream(generation_stream):
            begun = self._lockstep.begin(f"drafts {depth} tokens", self._cache[0].size())
            self._lockstep.follow(begun)
            tokens = self._inputs(sure, depth)
            logits, hidden = self._forward(tokens)
            after = [logits[i, len(known) - 1 :] for i, known in enumerate(sure)]
            judged = [
                row.judge(after[i], tokens[i, len(sure[i]) :]) if len(row.ahead) <= width else None
                for i, row in enumerate(self.rows)
            ]
            mx.eval(tokens, logits, [each for each in judged if each is not None])
            given, found, new, whole = cast(list[list[int]], tokens.tolist()), [], [], []
            for i, row in enumerate(self.rows):
                known, drafted, more = row.ahead, given[i][len(sure[i]) :], list[int]()
                if len(known) <= width:
                    more = row.extend(after[i], drafted, _listed(judged[i]))
                # A text that is over keeps nobody waiting.
                found.append(width if row.over else len(sure[i]) + choice.kept(drafted, more))
                new.append(more)
                whole.append(known + more + [0] * (width * row.over))
        columns = min(found)
        trim(self._cache, width - columns)
        for row in self.rows:
            row.cached += columns
        self._extend_drafts(new, [known[1 : columns + 1] for known in whole], hidden)
        return columns, begun

    def _inputs(self, sure: list[list[int]], depth: int) -> mx.array:
        """The tokens [b, 1 + depth] of a step."""
        if not depth or self._drafts is None:
            return mx.array(sure, mx.uint32)
        ahead = [known[1:] for known in sure]
        draft = self._drafts.propose(ahead, depth, [row.choice.next for row in self.rows])
        first = mx.array([known[:1] for known in sure], mx.uint32)
        return mx.concatenate([first, draft], axis=1)

    def _forward(self, tokens: mx.array) -> tuple[mx.array, mx.array | None]:
        if self._drafts is not None and self._drafts.needs_hidden:
            return self._model.states(tokens, self._cache)
        return self._model(tokens, self._cache), None

    def _extend_drafts(
        self, new: list[list[int]], following: list[list[int]], hidden: mx.array | None
    ) -> None:
        if self._drafts is not None:
            with mx.stream(generation_stream):
                self._drafts.extend(new, following, hidden)


def _listed(tokens: mx.array | None) -> list[int] | None:
    return None if tokens is None else cast(list[int], tokens.tolist())
