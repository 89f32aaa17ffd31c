"""What became of drafts, counted."""

from __future__ import annotations

from typing import Any

from ..limits import MOST_DRAFTS


class Statistics:
    """Counts steps and drafts; the first token, which ends the prompt, is left out."""

    def __init__(self) -> None:
        self._steps = self._rounds = self._tokens = 0
        self._seconds = 0.0
        self._proposed, self._reached, self._kept = (
            [0] * MOST_DRAFTS,
            [0] * MOST_DRAFTS,
            [0] * MOST_DRAFTS,
        )

    def count(self, tokens: int, seconds: float) -> None:
        """A step gave so many tokens and took so long."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds

    def count_drafts(self, proposed: int, kept: int) -> None:
        """A step had so many drafts and kept the first of them."""
        self._rounds += 1
        for i in range(proposed):
            self._proposed[i] += 1
            self._reached[i] += i <= kept
            self._kept[i] += i < kept

    def describe(self, plain_seconds: float | None) -> dict[str, Any]:
        """All of it, JSON-ready.

        ``acceptance`` has for each position in a draft the share that stayed, of all drafts that
        reached it; ``gain`` is how many times as fast all was as plain steps of ``plain_seconds``.
        """
        gain = plain_seconds and self._seconds and self._tokens * plain_seconds / self._seconds
        pairs = zip(self._kept, self._reached, strict=True)
        return {
            "rounds": self._rounds,
            "proposed": sum(self._proposed),
            "accepted": sum(self._kept),
            "acceptance": [kept / reached for kept, reached in pairs if reached],
            "tokens_per_step": self._tokens / self._steps if self._steps else None,
            "gain": gain or None,
        }
