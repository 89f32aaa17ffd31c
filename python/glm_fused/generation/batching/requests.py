"""What a scheduler of generations is asked for, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from ..options import Options


class Constraint(Protocol):
    """Which tokens may follow, such as those that a grammar allows; one for each request."""

    def allowed(self) -> mx.array:
        """Booleans [vocabulary]: the tokens that may come next; at least one of them is true."""
        ...

    def accept(self, token: int) -> None:
        """The text goes on with this token, which was allowed."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """A text to continue.

    Attributes:
        tokens: the prompt's, checked by `glm_fused.generation.prompts.encode`.
        options: how to generate. Sampling with a seed draws what it draws alone, whatever else is
            generated at the same time.
        top_logprobs: how many of the likeliest tokens each token's event lists with their
            log-probabilities, before sampling shapes them; None: no log-probabilities at all.
        constraint: which tokens may follow; None: all.
        scores_prompt: whether the prompt's tokens get log-probabilities, too, ``top_logprobs`` as
            others. None of them is taken from a store then.
    """

    tokens: Sequence[int]
    options: Options
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    scores_prompt: bool = False


@dataclass(frozen=True)
class ScoredToken:
    """A token of a prompt with its log-probability after those before it, and the likeliest there.

    The first token of a prompt has neither: nothing is before it.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class PromptProgress:
    """How many of the prompt's tokens have been taken, of which ``cached`` needed no work.

    ``scored`` are those that got their log-probabilities since the last event, where the request
    asks for them.
    """

    done: int
    total: int
    cached: int
    scored: tuple[ScoredToken, ...] = ()


class GeneratedToken(NamedTuple):
    """One more token.

    ``text`` is what is ready to be shown, possibly none. ``finish_reason`` is "stop" or "length" in
    the last event of a request and None before, ``stopped_by`` the stop text that it ended at, if
    it did. ``logprob`` and ``top`` (tokens with their log-probabilities, the likeliest first) are
    there where the request asks for them.
    """

    token: int
    text: str
    finish_reason: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    stopped_by: str | None = None


@dataclass(frozen=True)
class Failure:
    """The request ended with an error: the last event of a request."""

    error: Exception


Event = PromptProgress | GeneratedToken | Failure
OnEvent = Callable[[Event], None]


class Ticket(Protocol):
    """A request that was taken."""

    def cancel(self) -> None:
        """End it where it is, and give its memory back; no event follows once this is done."""
        ...
