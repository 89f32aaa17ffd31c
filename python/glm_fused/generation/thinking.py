"""Tells the text of an answer from the thinking that precedes it, as it arrives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .stops import StopTexts

_TAIL = 16  # tokens at the end of a prompt that may open the thinking


class Part(NamedTuple):
    """Some text, of the thinking or of the answer."""

    thinking: bool
    text: str


class ThinkingSplit:
    """Splits a text at the marks between which its model thinks.

    Args:
        tokenizer: knows the marks; where it has none, all is the answer.
        prompt: the tokens that the text follows; they may have opened the thinking already.
    """

    def __init__(self, tokenizer: TokenizerWrapper, prompt: Sequence[int]):
        self._marks = ("", "")
        self._thinking = False
        if tokenizer.has_thinking:
            self._marks = (tokenizer.think_start, tokenizer.think_end)
            end = tokenizer.decode(list(prompt[-_TAIL:]))
            self._thinking = end.rstrip().endswith(self._marks[0])
        self._until = self._next_mark()

    def feed(self, text: str) -> Iterator[Part]:
        """The parts of the next piece of text; what may be part of a mark is held back."""
        while text:
            shown, found = self._until.feed(text)
            if shown:
                yield Part(self._thinking, shown)
            if not found:
                return
            text = self._until.after
            self._thinking = not self._thinking
            self._until = self._next_mark()

    def rest(self) -> Iterator[Part]:
        """What is still held back when the text ends."""
        if text := self._until.rest():
            yield Part(self._thinking, text)

    def _next_mark(self) -> StopTexts:
        mark = self._marks[1 if self._thinking else 0]
        return StopTexts((mark,) if mark else ())
