"""Conversations become prompts: of plain texts so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..generation.prompts import encode
from ..generation.requests import Constraint
from ..models.decoder import Model
from .answers import AnswerParser


@dataclass(frozen=True)
class Prepared:
    """A prompt, what may follow it, and what will tell what it is."""

    tokens: list[int]
    constraint: Constraint | None
    parser: AnswerParser

    def again(self) -> Prepared:
        """The same for another answer, with a constraint and a parser of its own."""
        return Prepared(self.tokens, self.constraint, AnswerParser())


class Conversation:
    """Prepares the conversations of one model."""

    def __init__(self, model: Model, tokenizer: TokenizerWrapper):
        self._model, self._tokenizer = model, tokenizer

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str | Mapping[str, Any] = "auto",
        template_args: Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        *,
        parallel_tool_calls: bool = True,
    ) -> Prepared:
        """The prompt of a conversation. Raises ValueError for what it cannot have."""
        if tools:
            raise ValueError("[chat] tools: there are none yet.")
        if response_format is not None and response_format["type"] != "text":
            raise ValueError("[chat] response_format: there is none but text yet.")
        plain = [{"role": m["role"], "content": _text(m.get("content", ""))} for m in messages]
        return Prepared(encode(self._model, self._tokenizer, plain), None, AnswerParser())


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part["type"] != "text":
            raise ValueError(f"[chat] a part is {part['type']!r}, expected text.")
    return "\n".join(part["text"] for part in content)
