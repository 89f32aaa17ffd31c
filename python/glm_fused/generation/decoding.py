"""Decodes: from a prompt to one token after the other, with or without drafts."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream

from ..host import settle
from ..models.cache import trim
from ..models.decoder import Model
from .choice import Choice, kept
from .drafts.depth import Depth, Plan
from .drafts.drafter import Drafter, Kind
from .drafts.options import DraftOptions
from .drafts.statistics import Statistics
from .lockstep import Alone, steps_of
from .options import Options
from .tidying import tidy

OnPrompt = Callable[[int, int], None]
_TIDY = 256  # tokens after which MLX lets go of memory that it keeps
_PAUSE = 8  # plain steps of which one at most has a thought for drafts, where those do not pay


class Stopped(Exception):
    """Raised by whoever is told of progress, to end a generation where its cache is whole."""


@contextmanager
def settled() -> Iterator[None]:
    """Wait, at the end of a block that decodes, for what was evaluated ahead.

    That is a step which nobody asks for, so a failure in it must not reach a later generation.
    """
    try:
        yield
    finally:
        settle(generation_stream)


class Step(NamedTuple):
    """A token, and the logits [l, vocabulary] it was chosen from, of which it has one row."""

    token: int
    logits: mx.array
    row: int


class Drafting(NamedTuple):
    """What makes drafts, and what decides how many."""

    drafter: Drafter
    depth: Depth

    @classmethod
    def of(cls, options: DraftOptions | None, model: Model) -> Drafting | None:
        """What ``options`` ask for; None where they ask for none."""
        return None if options is None else cls(options.drafter(model), options.chooser(model))

    def next(self, left: int) -> Plan | None:
        """Which drafts to make now, where ``left`` tokens are wanted; None for a plain step."""
        return self.depth.next(self.drafter.kinds(), left - 1, self.drafter.lacking)


class _Ahead(NamedTuple):
    """A plain step on its way."""

    token: mx.array
    logits: mx.array
    hidden: mx.array | None
    begun: list[mx.array]


class Decoding:
    """The tokens that follow a prompt: as many as there may be, whatever they are.

    While a plain step's token is awaited the next step is on its way already. A step with drafts
    gives several tokens at once; the drafts that are not kept are cut off the cache, so it is as if
    they had never been there.

    Attributes:
        statistics: what became of drafts.

    Args:
        model: takes the tokens.
        prompt: its tokens.
        options: how tokens are chosen, and how many there are (``max_tokens``, which is given).
        cache: the model's, which is filled.
        prefill_step_size: tokens of the prompt that the model takes at a time.
        drafting: what makes drafts; None for none.
        cached: how many of the prompt's tokens ``cache`` has already, fewer than all.
    """

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        options: Options,
        cache: Sequence[Any],
        prefill_step_size: int,
        drafting: Drafting | None = None,
        cached: int = 0,
    ):
        assert options.max_tokens is not None
        self._model, self._cache, self._drafting = model, cache, drafting
        self._known, self._prefill_step = list(prompt), prefill_step_size
        self._left, self._cached = options.max_tokens, cached
        self._choice = Choice(options, model.args.vocab_size, self._known)
        self._lockstep = Alone() if drafting is None else steps_of(model)
        self._ahead: _Ahead | None = None
        self._ready: float | None = None  # when there was a token whose next was on its way
        # Plain steps without a thought for drafts, now and in a row; their tokens and states.
        self._rest, self._pause = 0, 1
        self._waiting: list[tuple[int, mx.array | None]] = []
        self.statistics = Statistics()

    def steps(self, on_prompt: OnPrompt = lambda done, total: None) -> Generator[Step]:
        """Take the prompt, of which ``on_prompt`` gets the tokens done and all, then decode."""
        size = len(self._known)
        self._take_prompt(on_prompt)
        first = self._plain(1)
        given = 0
        try:
            on_prompt(size, size)
            given = 1
            yield from first
            began = time.perf_counter()
            while self._left:
                steps = self._some()
                # With what the caller does in between, which is beside a plain step.
                began, before = time.perf_counter(), began
                self.statistics.count(len(steps), began - before)
                for step in steps:
                    given += 1
                    yield step
                    if given % _TIDY == 0:
                        tidy(self._model)
            if self._drafting is not None:
                self._tell(self._drafting.drafter)
        finally:
            self._trim(self._cache[0].size() - size - given)

    def _take_prompt(self, on_prompt: OnPrompt) -> None:
        """All tokens of the prompt but the last, which is the first to be decoded."""
        total, done = len(self._known), self._cached
        drafter = None if self._drafting is None else self._drafting.drafter
        if drafter is not None:
            drafter.start(self._known, done)
        on_prompt(done, total)
        while done < total - 1:
            chunk = self._known[done : min(done + self._prefill_step, total - 1)]
            with mx.stream(generation_stream):
                _, hidden = self._forward(mx.array(chunk)[None])
                primed = [] if drafter is None or hidden is None else drafter.prime(hidden)
                mx.eval([layer.state for layer in self._cache], primed)
            done += len(chunk)
            on_prompt(done, total)
            tidy(self._model)

    def _some(self) -> list[Step]:
        """One plain step, or one with drafts."""
        drafting = self._drafting
        if drafting is None or self._rest:
            return self._plain(1)
        plan = drafting.next(self._left)
        if plan is None:
            steps = self._plain(1)
            self._review(drafting)
            self._rest = min(self._pause - 1, drafting.depth.rest)
            self._pause = min(2 * self._pause, _PAUSE)
            return steps
        self._pause = 1
        return self._plain(0) if self._ahead else self._drafted(plan)

    def _review(self, drafting: Drafting) -> None:
        """See whether there should have been drafts, now and then."""
        (drafter, depth), began = drafting, time.perf_counter()
        if (found := drafter.reviewable()) is not None and depth.reviews(*found):
            self._ready = None
            self._follow("looks back")
            with mx.stream(generation_stream):
                guessed = drafter.review()
            kind, rows = found
            for stayed in guessed:
                depth.count_unmade(kind, stayed)
            depth.count_rows(rows, self._lockstep.shared(time.perf_counter() - began))

    def _plain(self, ahead: int) -> list[Step]:
        """The next token; with ``ahead`` the step after it is on its way then."""
        before, steady = self._ready, self._ahead is not None and ahead
        now = self._ahead or self._launch(mx.array(self._known[-1:], mx.uint32), ())
        self._ahead = None
        if ahead and self._left > 1:
            self._ahead = self._launch(now.token, (now.token,))
        token = cast(int, now.token.item())
        self._ready = time.perf_counter() if ahead else None
        if self._drafting is not None:
            seconds = self._ready - before if before and self._ready and steady else None
            seconds = self._lockstep.follow(now.begun, seconds)
            self._note(self._drafting, token, now.hidden, seconds)
        self._known.append(token)
        self._left -= 1
        return [Step(token, now.logits, 0)]

    def _note(
        self, drafting: Drafting, token: int, hidden: mx.array | None, seconds: float | None
    ) -> None:
        """A plain step has given a token; while there is no thought for drafts it only waits."""
        (drafter, depth), waiting = drafting, self._waiting
        waiting.append((token, hidden))
        self._rest = max(self._rest - 1, 0)
        if self._rest:
            return
        if len(waiting) == 1:
            for kind, stayed in drafter.unmade(token):
                depth.count_unmade(kind, stayed)
        depth.count_plain(seconds, len(waiting))
        self._tell(drafter)

    def _tell(self, drafter: Drafter) -> None:
        """Tell what makes drafts of the tokens that wait."""
        with mx.stream(generation_stream):
            for token, hidden in self._waiting:
                drafter.extend([token], hidden)
        self._waiting.clear()

    def _launch(self, token: mx.array, ahead: Sequence[mx.array]) -> _Ahead:
        """A plain step that takes a token [1], of those ``ahead`` of the known ones the last."""
        with mx.stream(generation_stream):
            begun = self._lockstep.begin("takes a plain step", self._cache[0].size())
            logits, hidden = self._forward(token[None])
            step = _Ahead(self._choice.next(logits[0], ahead), logits[0], hidden, begun)
            mx.async_eval(step.token, step.logits, [] if hidden is None else hidden, begun)
        return step

    def _drafted(self, plan: Plan) -> list[Step]:
        """The tokens of a step with such drafts: those that are kept, and one more."""
        assert self._drafting is not None
        (kind, depth), drafter = plan, self._drafting.drafter
        self._follow(f"drafts {depth} tokens by {kind.source}")
        self._catch_up(kind)
        self._ready, began = None, time.perf_counter()
        with mx.stream(generation_stream):
            draft = drafter.propose(kind, depth, self._choice.next)
            known = mx.array(self._known[-1:], mx.uint32)
            logits, hidden = self._forward(mx.concatenate([known, draft])[None])
            logits = logits[0]
            chosen = self._choice.judge(logits, draft)
            mx.eval(draft, chosen)
        tokens = _listed(chosen)
        count = kept(_listed(draft), tokens)
        seconds = self._lockstep.shared(time.perf_counter() - began)
        del tokens[count + 1 :]
        self._trim(depth - count)
        self._known.extend(tokens)
        self._left -= len(tokens)
        with mx.stream(generation_stream):
            drafter.extend(tokens, None if hidden is None else hidden[:, : count + 1])
        self.statistics.count_drafts(kind.source, depth, count)
        self._drafting.depth.count(plan, count, seconds)
        return [Step(token, logits, row) for row, token in enumerate(tokens)]

    def _follow(self, what: str) -> None:
        """What comes next is what all ranks do."""
        with mx.stream(generation_stream):
            self._lockstep.follow(self._lockstep.begin(what, self._cache[0].size()))

    def _catch_up(self, kind: Kind) -> None:
        """What former steps have left to do before such a draft."""
        assert self._drafting is not None
        (drafter, depth), began = self._drafting, time.perf_counter()
        rows = drafter.lacking(kind)
        with mx.stream(generation_stream):
            if left := drafter.catch_up(kind):
                mx.eval(left)
                depth.count_rows(rows, self._lockstep.shared(time.perf_counter() - began))

    def _forward(self, tokens: mx.array) -> tuple[mx.array, mx.array | None]:
        """The logits [1, l, vocabulary] of tokens [1, l], and what a drafter needs besides."""
        if self._drafting is not None and self._drafting.drafter.needs_hidden:
            return self._model.states(tokens, self._cache)
        return self._model(tokens, self._cache), None

    def _trim(self, columns: int) -> None:
        """Have the cache forget its last columns, if any."""
        if columns > 0:
            trim(self._cache, columns)


def _listed(array: mx.array) -> list[int]:
    return cast(list[int], array.tolist())
