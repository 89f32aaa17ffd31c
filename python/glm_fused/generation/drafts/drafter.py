"""What makes drafts: one interface for look-up, MTP layers and small models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from ..limits import MOST_DRAFTS

MATCHES = (2, 3, 4, 8, 16)  # tokens that are the same, or more: the more, the more drafts stay

# Takes logits [1, vocabulary] and the drafts before them, uint32 [n] (besides all known tokens);
# returns a token, uint32 [1].
Draw = Callable[[mx.array, Sequence[mx.array]], mx.array]

FEW_WAITING = 16  # of which a draft takes at a time; more are a matter of their own


class Kind(NamedTuple):
    """A kind of draft: the next tokens of those of one kind are counted together.

    Attributes:
        source: what makes it, on which it depends what a step with such drafts costs.
        match: how many tokens before it speak for it, of `MATCHES`; 0 where it is not made so.
        place: how many of its tokens have stayed already.
    """

    source: str
    match: int = 0
    place: int = 0


@cache
def course(kind: Kind) -> tuple[Kind, ...]:
    """The kinds of which each token of such a draft is, where those before it stay."""
    places = range(MOST_DRAFTS)
    if kind.match:
        return tuple(Kind(kind.source, matching(kind.match + place)) for place in places)
    return tuple(Kind(kind.source, 0, kind.place + place) for place in places)


def matching(same: int) -> int:
    """The largest of `MATCHES` that so many equal tokens are."""
    return max(match for match in MATCHES if match <= same)


class Drafter(ABC):
    """Guesses the tokens that follow the known ones of one text.

    It is told of all tokens: first the prompt (`start`), then what follows it (`extend`). One that
    `needs_hidden` gets the model's normed hidden states, too: for each token that of the position
    before it, from which the model chose it.
    """

    needs_hidden: ClassVar[bool] = False

    @abstractmethod
    def start(self, prompt: Sequence[int], cached: int = 0) -> None:
        """Begin a text with the tokens of its prompt, of which the model's cache has some.

        The hidden states of those that are ``cached`` are not given any more.
        """

    def prime(self, hidden: mx.array) -> list[Any]:
        """Take the hidden states [1, l, hidden] of the next l tokens of the prompt.

        Returns the arrays to evaluate before the next ones are given.
        """
        return []

    @abstractmethod
    def kinds(self) -> list[Kind]:
        """Which kinds of draft there can be now, the likeliest to stay first; maybe none."""

    def unmade(self, token: int) -> list[tuple[Kind, bool]]:
        """Kinds of draft that there could be now, and whether their first token is this one.

        Only those of which that is known without drafting.
        """
        return []

    def lacking(self, kind: Kind) -> int:
        """How many rows there are to catch up with before a draft of a kind."""
        return 0

    def reviewable(self) -> tuple[Kind, int] | None:
        """The kind that a review is about, and how many rows it takes; None where it is short."""
        return None

    def review(self) -> list[bool]:
        """Whether the likeliest token was the right one, of drafts that there might have been."""
        return []

    def catch_up(self, kind: Kind) -> list[Any]:
        """Take what tokens since the last draft of a kind have left to do, if it is much.

        Returns the arrays to evaluate before the next draft.
        """
        return []

    @abstractmethod
    def propose(self, kind: Kind, depth: int, draw: Draw) -> mx.array:
        """Guess ``depth`` tokens, uint32 [depth], which need not be evaluated yet.

        ``kind`` is one of the `kinds` of draft that there can be.
        """

    @abstractmethod
    def extend(self, tokens: Sequence[int], hidden: mx.array | None) -> None:
        """The text goes on with ``tokens``, whatever was guessed.

        ``hidden`` [1, l, hidden] is for those that need it.
        """
