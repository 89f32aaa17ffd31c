"""What a model generates, taken apart as it comes: reasoning, text and calls of tools."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation.batching.requests import GeneratedToken
from .arguments import ArgumentWriter
from .tools import CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END, Tool


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before, or between, what it says."""

    text: str


@dataclass(frozen=True)
class Text:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The model calls the tool ``name``: call ``index`` of the answer, from 0 on."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """More of a call's arguments; the pieces of one call are together a JSON object."""

    index: int
    json_piece: str


Said = Reasoning | Text
Delta = Said | ToolCallStart | ToolArguments


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """The same with one delta for each run of text, of reasoning and of a call's arguments."""
    found = list[Delta]()
    for delta in deltas:
        match found[-1:], delta:
            case [Text(before)], Text(text):
                found[-1] = Text(before + text)
            case [Reasoning(before)], Reasoning(text):
                found[-1] = Reasoning(before + text)
            case [ToolArguments(index, before)], ToolArguments(same, text) if same == index:
                found[-1] = ToolArguments(index, before + text)
            case _:
                found.append(delta)
    return found


class Thinking(NamedTuple):
    """The marks between which a model thinks."""

    start: str
    end: str

    @classmethod
    def of(cls, tokenizer: TokenizerWrapper) -> Thinking | None:
        """Those that a tokenizer knows; None where its model does not think."""
        if not tokenizer.has_thinking:
            return None
        return cls(tokenizer.think_start, tokenizer.think_end)

    def left_by(self, prompt: str) -> tuple[bool, bool]:
        """Whether a prompt ends within thinking, and whether it ends with the end of thinking."""
        end = prompt.rstrip()
        return end.endswith(self.start), end.endswith(self.end)


class _State(Enum):
    THINKING = auto()
    TEXT = auto()
    NAME = auto()  # of a tool
    BETWEEN = auto()  # a call's name or one of its arguments, and what comes next
    KEY = auto()
    BEFORE_VALUE = auto()
    VALUE = auto()


class AnswerParser:
    """Takes one answer apart; no mark of the format shows up in what it gives.

    Space around calls and thinking is not part of the text. A call may be opened while the model
    thinks, which it then goes on to do after it. A call that is not finished when the answer ends
    has the arguments that were there, also well-formed JSON; one whose name was not finished is
    none. Of an argument that is given twice, the first stays.

    Args:
        tools: those that may be called; without any, what looks like a call is text.
        thinking: the model's marks of thinking; None: it has none.
        opened: the prompt ends within thinking, which the answer goes on with.
        closed: the prompt ends with the end of thinking.

    Attributes:
        reasoning_tokens: how many tokens came while the model thought, with the end's mark.
        calls: how many calls have started.
    """

    def __init__(
        self,
        tools: Sequence[Tool] = (),
        thinking: Thinking | None = None,
        *,
        opened: bool = False,
        closed: bool = False,
    ):
        self._tools, self._held = {tool.name: tool for tool in tools}, ""
        self._marks = _marks(thinking, bool(tools))
        self._firsts = {state: {m[0] for m in marks} for state, marks in self._marks.items()}
        self._thinking = thinking
        self._state = self._outer = _State.THINKING if opened else _State.TEXT
        self._fresh, self._space = closed, ""  # whether a mark came last; space not yet shown
        self._writer: ArgumentWriter | None = None
        self._key: str | None = None
        self.reasoning_tokens = self.calls = 0

    def feed(self, token: GeneratedToken) -> list[Delta]:
        """What one more token adds."""
        self.reasoning_tokens += self._state is _State.THINKING
        return self.feed_text(token.text)

    def feed_text(self, text: str) -> list[Delta]:
        """What more text adds."""
        self._held += text
        deltas: list[Delta] = []
        while True:
            text, mark = self._take()
            deltas += self._pass(text)
            if mark is None:
                return deltas
            deltas += self._turn(text, mark)

    def finish(self) -> list[Delta]:
        """What is still to be said once the answer has ended."""
        rest, self._held = self._held, ""
        deltas = self._pass(rest)
        if self._state in (_State.THINKING, _State.TEXT):
            return [*deltas, *self._spaced()]
        if self._state is not _State.NAME:
            deltas += self._pieces(self._end_of_call())
        return deltas

    def _take(self) -> tuple[str, str | None]:
        """The text before the next mark, and the mark; or what certainly comes before any."""
        held, marks = self._held, self._marks[self._state]
        at, mark = len(held), None
        if not self._firsts[self._state].isdisjoint(held):  # as it mostly is
            at, mark = min(
                ((at, mark) for mark in marks if (at := held.find(mark)) >= 0),
                default=(len(held) - max(_overlap(held, mark) for mark in marks), None),
            )
        if self._state in (_State.NAME, _State.KEY) and mark is None:
            return "", None  # these are wanted whole
        self._held = held[at + len(mark or "") :]
        return held[:at], mark

    def _pass(self, text: str) -> list[Delta]:
        """What text of the present state gives, without its end."""
        if self._state in (_State.THINKING, _State.TEXT):
            return self._flow(text)
        if self._state is _State.VALUE and self._writer is not None and self._key is not None:
            return self._pieces(self._writer.more(text))
        return []

    def _flow(self, text: str) -> list[Delta]:
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        if self._marks[self._state]:
            text = self._space + text
            shown = text.rstrip()
            self._space = text[len(shown) :]
            text = shown
        return self._said(text)

    def _spaced(self) -> list[Delta]:
        space, self._space = self._space, ""
        return self._said(space)

    def _said(self, text: str) -> list[Delta]:
        kind = Reasoning if self._state is _State.THINKING else Text
        return [kind(text)] if text else []

    def _turn(self, text: str, mark: str) -> list[Delta]:
        """Change the state at a mark, which ``text`` came before."""
        if mark == CALL:
            return self._open_call()
        if self._state in (_State.THINKING, _State.TEXT):
            return self._turn_thinking(mark)
        if self._state is _State.NAME:
            return self._start_call(text.strip(), mark)
        if mark == CALL_END:
            return self._close_call()
        if self._state is _State.KEY:
            self._key = text.strip()
        if mark == VALUE:
            return self._open_value()
        deltas: list[Delta] = []
        if mark == VALUE_END and self._writer is not None and self._key is not None:
            deltas = self._pieces(self._writer.end_value())
        self._key = None if mark == VALUE_END else self._key
        self._state = _AFTER[mark]
        return deltas

    def _turn_thinking(self, mark: str) -> list[Delta]:
        ends = self._thinking is not None and mark == self._thinking.end
        deltas = self._spaced() if self._state is _State.THINKING else []
        self._state, self._space, self._fresh = _State.TEXT, "", ends
        if not ends:
            self._state = _State.THINKING
        return deltas

    def _open_call(self) -> list[Delta]:
        """A call begins, in the middle of another where that lacks its end."""
        deltas: list[Delta] = []
        if self._state in (_State.THINKING, _State.TEXT):
            self._outer = self._state
        elif self._state is not _State.NAME:
            deltas = self._pieces(self._end_of_call())
        self._state, self._space = _State.NAME, ""
        return deltas

    def _start_call(self, name: str, mark: str) -> list[Delta]:
        deltas: list[Delta] = []
        if name:
            self._writer = ArgumentWriter(self._tools.get(name, Tool(name)))
            deltas.append(ToolCallStart(self.calls, f"call_{uuid.uuid4().hex[:24]}", name))
            self.calls += 1
        self._key, self._state = None, _State.KEY
        if mark == CALL_END:
            return deltas + self._close_call()
        return deltas + (self._open_value() if mark == VALUE else [])

    def _open_value(self) -> list[Delta]:
        self._state = _State.VALUE
        if self._writer is None or self._key is None:
            return []
        return self._pieces(self._writer.begin_value(self._key))

    def _close_call(self) -> list[Delta]:
        deltas = self._pieces(self._end_of_call())
        self._state, self._fresh = self._outer, True
        return deltas

    def _end_of_call(self) -> str:
        writer, self._writer = self._writer, None
        return "" if writer is None else writer.end()

    def _pieces(self, text: str) -> list[Delta]:
        return [ToolArguments(self.calls - 1, text)] if text else []


_AFTER = {
    KEY: _State.KEY,
    KEY_END: _State.BEFORE_VALUE,
    VALUE_END: _State.BETWEEN,
}


def _marks(thinking: Thinking | None, tools: bool) -> dict[_State, tuple[str, ...]]:
    """The marks that mean something in each state."""
    outer = (*(thinking or ()), *((CALL,) if tools else ()))
    return {
        _State.THINKING: outer,
        _State.TEXT: outer,
        _State.NAME: (KEY, VALUE, CALL, CALL_END),
        _State.BETWEEN: (KEY, VALUE, CALL, CALL_END),
        _State.KEY: (KEY_END, VALUE, CALL, CALL_END),
        _State.BEFORE_VALUE: (KEY, VALUE, CALL, CALL_END),
        _State.VALUE: (VALUE_END,),  # a value may speak of calls
    }


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``mark``."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)
