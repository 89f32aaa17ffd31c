"""Conversations become prompts, and what the model writes becomes answers: plain texts so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..engine import Engine
from ..generation.requests import Constraint, GeneratedToken


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of an answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call of a tool begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """A piece of a call's arguments, which are JSON together."""

    index: int
    json_piece: str


Delta = Reasoning | Text | ToolCallStart | ToolArguments


class Parser(Protocol):
    """Tells what the tokens of an answer are."""

    def feed(self, event: GeneratedToken) -> list[Delta]:
        """What a token makes clear."""
        ...

    def finish(self) -> list[Delta]:
        """What is left when the last token has come."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A prompt, what may follow it, and what will tell what it is."""

    tokens: list[int]
    constraint: Constraint | None
    parser: Parser


class PlainParser:
    """All of it is text."""

    def feed(self, event: GeneratedToken) -> list[Delta]:
        """The token's text."""
        return [Text(event.text)] if event.text else []

    def finish(self) -> list[Delta]:
        """Nothing."""
        return []


class Conversation:
    """Makes prompts of conversations with the model of ``engine``."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        template_args: Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
    ) -> Prepared:
        """The prompt of a conversation. Raises ValueError for what it cannot have."""
        if tools:
            raise ValueError("[chat] tools: there are none yet.")
        if response_format is not None and response_format["type"] != "text":
            raise ValueError("[chat] response_format: there is none but text yet.")
        plain = [{"role": m["role"], "content": _text(m.get("content", ""))} for m in messages]
        return Prepared(self._engine.encode(plain), None, PlainParser())


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part["type"] != "text":
            raise ValueError(f"[chat] a part is {part['type']!r}, expected text.")
    return "\n".join(part["text"] for part in content)
