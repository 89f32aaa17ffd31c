"""A text that is generated beside others: what is known of it, and whom it goes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from ..choice import Choice, kept
from ..ending import Text
from .requests import Event, GeneratedToken, GenerationRequest, PromptProgress, ScoredToken
from .scores import scores


class Row:
    """A text: its known tokens, of which a cache has the first ``cached``.

    Attributes:
        known: the tokens of the prompt and those that followed.
        cached: how many of them are in the cache; the last one never is.
        choice: how tokens are chosen, but for the constraint.
        takes_likeliest: whether no token depends on ``choice``, or none before the last is known.
        reason: why the text has ended, "stop" or "length"; None while it has not.
        error: what its constraint or its listener raised, which ended it.

    Args:
        request: what was asked for, with ``max_tokens`` given.
        vocabulary: how many tokens there are.
        ending: puts the text together.
        tell: gets its events.
    """

    def __init__(
        self,
        request: GenerationRequest,
        vocabulary: int,
        ending: Text,
        tell: Callable[[Event], None],
    ):
        assert request.options.max_tokens is not None
        self.known, self.prompt_tokens = list(request.tokens), len(request.tokens)
        self.cached, self.from_store = 0, 0
        self.most = self.prompt_tokens + request.options.max_tokens
        self.choice = Choice(request.options, vocabulary, self.known)
        self.constraint, self.top = request.constraint, request.top_logprobs
        self.takes_likeliest = self.constraint is not None or self.choice.takes_likeliest
        self.scores_prompt = request.scores_prompt
        self.reason: str | None = None
        self.error: Exception | None = None
        self._ending, self._tell = ending, tell

    @property
    def ahead(self) -> list[int]:
        """The known tokens that the cache does not have, at least one."""
        return self.known[self.cached :]

    @property
    def needs_logits(self) -> bool:
        """Whether it goes on with logits: for log-probabilities, or for its constraint."""
        return self.top is not None or self.constraint is not None

    @property
    def left(self) -> int:
        """How many tokens may still follow."""
        return self.most - len(self.known)

    @property
    def over(self) -> bool:
        """Whether no token follows."""
        return self.reason is not None or self.error is not None

    def start(self, cached: int) -> None:
        """The cache has the first tokens of the prompt, from an earlier one."""
        self.from_store = cached
        self.fill(cached, (ScoredToken(self.known[0]),) if self.scores_prompt else ())

    def fill(self, cached: int, scored: Sequence[ScoredToken] = ()) -> None:
        """The cache has so many tokens of the prompt now; these of it have got their scores."""
        self.cached = cached
        try:
            self._prompt_done(cached, tuple(scored))
        except Exception as error:
            self.error = error

    def judge(self, logits: mx.array, draft: mx.array) -> mx.array | None:
        """What the text goes on with beside a draft, see `Choice.judge`; not evaluated yet.

        None under a constraint, where each token has to be known before the next is chosen.
        """
        return None if self.constraint is not None else self.choice.judge(logits, draft)

    def extend(
        self, logits: mx.array | None, draft: Sequence[int], chosen: Sequence[int] | None
    ) -> list[int]:
        """Go on, up to where the text ends; returns the tokens that it goes on with.

        Those are tokens of the ``draft`` [d] and, if it goes on after them, one more. ``chosen`` is
        what `judge` gave for the ``logits`` [d + 1, vocabulary], which are evaluated, and may be
        None unless it `needs_logits`; a constraint takes the place of what was chosen. What
        constraint and listener raise ends the text, as its `error`.
        """
        before = len(self.known)
        try:
            if self.constraint is not None:
                self._constrained(logits, draft)
            else:
                assert chosen is not None
                for i, token in enumerate(chosen[: kept(draft, chosen) + 1]):
                    self._take(token, logits, i)
                    if self.over:
                        break
        except Exception as error:
            self.error = error
        return self.known[before:]

    def _constrained(self, logits: mx.array | None, draft: Sequence[int]) -> None:
        assert self.constraint is not None and logits is not None
        for i in range(len(draft) + 1):
            row = logits[i : i + 1]
            row = mx.where(self.constraint.allowed(), row, mx.array(-mx.inf, row.dtype))
            token = cast(int, self.choice.next(row).item())
            self.constraint.accept(token)
            self._take(token, logits, i)
            if self.over or token not in draft[i : i + 1]:
                return

    def _take(self, token: int, logits: mx.array | None, at: int) -> None:
        """The text goes on with a token, which was chosen by row ``at`` of the logits."""
        if len(self.known) == self.prompt_tokens:
            self._prompt_done(self.prompt_tokens)
        self.known.append(token)
        text, self.reason = self._ending.feed(token)
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if self.top is not None:
            assert logits is not None
            ((logprob, top),) = scores(logits[at : at + 1], [token], self.top)
        stopped_by = None if self.reason is None else self._ending.stopped_by
        self._tell(GeneratedToken(token, text, self.reason, logprob, top, stopped_by))

    def _prompt_done(self, done: int, scored: tuple[ScoredToken, ...] = ()) -> None:
        self._tell(PromptProgress(done, self.prompt_tokens, self.from_store, scored))
