"""Finds the texts that end a generated text, although they arrive in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Lets text through up to the first of ``stops`` that appears in it.

    Text that may be the beginning of a stop text is held back until it is clear that it is none.

    Attributes:
        after: what came in one piece with the stop text, behind it.
        found: the stop text; None before there is one.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.after = stops, "", ""
        self.found: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop text has ended it."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found)
            self.found = stop
            self._held, self.after = "", text[at + len(stop) :]
            return text[:at], True
        shown = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[shown:]
        return text[:shown], False

    def rest(self) -> str:
        """What is still held back when the text ends in another way."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
