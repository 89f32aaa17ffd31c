"""Drafts from the text itself: what followed the last tokens when they appeared before."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..limits import LOOKUP
from .drafter import Drafter, Draw, Kind

LONGEST, SHORTEST = 4, 2  # tokens that have to be the same
MATCHES = (2, 3, 4, 8, 16)  # or that many besides: the more, the more drafts stay


class LookupDrafter(Drafter):
    """Guesses that the text goes on as it did after the last place with the same tokens.

    Of the places with the most tokens in common, up to `LONGEST`, it takes the latest.
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        self._places: list[dict[tuple[int, ...], int]] = []

    def start(self, prompt: Sequence[int], cached: int = 0) -> None:
        self._text, self._places = [], [{} for _ in range(SHORTEST, LONGEST + 1)]
        self.extend(prompt, None)

    def extend(self, tokens: Sequence[int], hidden: mx.array | None) -> None:
        text = self._text
        for token in tokens:
            # What ends here is a place to look up once it is known how it goes on.
            for length, places in enumerate(self._places, SHORTEST):
                if len(text) >= length:
                    places[tuple(text[-length:])] = len(text)
            text.append(token)

    def kinds(self) -> list[Kind]:
        found = self._found()
        if found is None:
            return []
        same = self._same_before(*found)
        return [Kind(LOOKUP, max(match for match in MATCHES if match <= same))]

    def propose(self, kind: Kind, depth: int, draw: Draw) -> mx.array:
        found = self._found()
        assert found is not None
        text, at = self._text, found[1]
        guess = text[at : at + depth]
        while len(guess) < depth:  # it goes on with what is guessed: a text that repeats itself
            guess.append(guess[at + len(guess) - len(text)])
        return mx.array(guess, mx.uint32)

    def _found(self) -> tuple[int, int] | None:
        """How many tokens are the same, and where the text went on after them."""
        for length in range(LONGEST, SHORTEST - 1, -1):
            if len(self._text) >= length:
                at = self._places[length - SHORTEST].get(tuple(self._text[-length:]))
                if at is not None:
                    return length, at
        return None

    def _same_before(self, length: int, at: int) -> int:
        """How many tokens before ``at`` are the last ones, of which ``length`` are known to be."""
        text, most = self._text, min(MATCHES[-1], at)
        while length < most and text[at - length - 1] == text[-length - 1]:
            length += 1
        return length
