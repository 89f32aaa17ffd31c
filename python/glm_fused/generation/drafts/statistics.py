"""What became of drafts, counted."""

from __future__ import annotations

from typing import Any

from ..limits import MOST_DRAFTS


class Counts:
    """Counts the drafts of one source."""

    def __init__(self) -> None:
        self.rounds, self.proposed = 0, 0
        self.reached, self.kept = [0] * MOST_DRAFTS, [0] * MOST_DRAFTS

    def add(self, proposed: int, kept: int) -> None:
        self.rounds += 1
        self.proposed += proposed
        for i in range(proposed):
            self.reached[i] += i <= kept
            self.kept[i] += i < kept

    def describe(self) -> dict[str, Any]:
        """All of it, JSON-ready, without places that no draft reached."""
        places = MOST_DRAFTS - self.reached.count(0)
        reached, kept = self.reached[:places], self.kept[:places]
        return {
            "rounds": self.rounds,
            "proposed": self.proposed,
            "accepted": sum(kept),
            "reached": reached,
            "kept": kept,
            "acceptance": [a / b for a, b in zip(kept, reached, strict=True)],
        }


class Statistics:
    """Counts steps and drafts; the first token, which ends the prompt, is left out."""

    def __init__(self) -> None:
        self._steps = self._tokens = 0
        self._seconds = 0.0
        self._all, self._sources = Counts(), dict[str, Counts]()

    def count(self, tokens: int, seconds: float) -> None:
        """A step gave so many tokens and took so long."""
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds

    def count_drafts(self, source: str, proposed: int, kept: int) -> None:
        """A step had so many drafts from a source and kept the first of them."""
        for counts in (self._all, self._sources.setdefault(source, Counts())):
            counts.add(proposed, kept)

    def describe(self, plain_seconds: float | None) -> dict[str, Any]:
        """All of it, JSON-ready.

        For each place in a draft, ``reached`` has how many drafts were made there and had all those
        before them stay, ``kept`` how many of these stayed themselves, and ``acceptance`` their
        share; ``gain`` is how many times as fast all was as plain steps of ``plain_seconds``.
        """
        gain = plain_seconds and self._seconds and self._tokens * plain_seconds / self._seconds
        return self._all.describe() | {
            "sources": {name: counts.describe() for name, counts in self._sources.items()},
            "tokens_per_step": self._tokens / self._steps if self._steps else None,
            "gain": gain or None,
        }
