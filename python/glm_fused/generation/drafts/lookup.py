"""Drafts from the text itself: what followed the last tokens when they appeared before."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..limits import LOOKUP
from .drafter import MATCHES, Drafter, Draw, Kind, matching

LONGEST, SHORTEST = 4, 2  # tokens that have to be the same
_KINDS = [Kind(LOOKUP, matching(max(same, MATCHES[0]))) for same in range(MATCHES[-1] + 1)]


class LookupDrafter(Drafter):
    """Guesses that the text goes on as it did after the last place with the same tokens.

    Of the places with the most tokens in common, up to `LONGEST`, it takes the latest.
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        # Where the text last went on after its shortest pieces, and after its longer ones, of which
        # those that end before `_indexed` are there.
        self._places: dict[tuple[int, ...], int] = {}
        self._longer: list[dict[tuple[int, ...], int]] = []
        self._indexed = 0
        # Where the text went on after its last tokens, and how many are the same there; 0: nowhere.
        self._at = self._same = 0

    def start(self, prompt: Sequence[int], cached: int = 0) -> None:
        self._text, self._places, self._indexed = [], {}, 0
        self._longer = [{} for _ in range(SHORTEST, LONGEST)]
        self.extend(prompt, None)

    def extend(self, tokens: Sequence[int], hidden: mx.array | None) -> None:
        text, places = self._text, self._places
        for token in tokens:
            # What ends here is a place to look up once it is known how it goes on.
            if (end := len(text)) >= SHORTEST:
                places[tuple(text[-SHORTEST:])] = end
            text.append(token)
        self._at, self._same = self._found()

    def kinds(self) -> list[Kind]:
        return [_KINDS[self._same]] if self._same else []

    def unmade(self, token: int) -> list[tuple[Kind, bool]]:
        return [(_KINDS[self._same], self._text[self._at] == token)] if self._same else []

    def propose(self, kind: Kind, depth: int, draw: Draw) -> mx.array:
        text, at = self._text, self._at
        guess = text[at : at + depth]
        while len(guess) < depth:  # it goes on with what is guessed: a text that repeats itself
            guess.append(guess[at + len(guess) - len(text)])
        return mx.array(guess, mx.uint32)

    def _found(self) -> tuple[int, int]:
        """Where the text went on after its last tokens, and how many of them are the same there."""
        text = self._text
        shortest = self._places.get(tuple(text[-SHORTEST:]))
        if shortest is None:  # so nothing longer was there either
            return 0, 0
        self._index_longer()
        for length in range(LONGEST, SHORTEST, -1):
            if len(text) >= length:
                at = self._longer[length - SHORTEST - 1].get(tuple(text[-length:]))
                if at is not None:
                    return at, self._same_before(length, at)
        return shortest, self._same_before(SHORTEST, shortest)

    def _index_longer(self) -> None:
        """Note where the text went on after all pieces but the last."""
        text = self._text
        for end in range(self._indexed, len(text)):
            for length, places in enumerate(self._longer, SHORTEST + 1):
                if end >= length:
                    places[tuple(text[end - length : end])] = end
        self._indexed = len(text)

    def _same_before(self, length: int, at: int) -> int:
        """How many tokens before ``at`` are the last ones, of which ``length`` are known to be."""
        text, most = self._text, min(MATCHES[-1], at)
        if at == self._at + 1 and self._same:  # one more than there were
            return min(self._same + 1, most)
        while length < most and text[at - length - 1] == text[-length - 1]:
            length += 1
        return length
