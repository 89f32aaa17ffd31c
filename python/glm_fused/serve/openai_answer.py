"""One answer of chat/completions, made of what the model's tokens turn out to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..generation.batching.requests import GeneratedToken
from .answers import AnswerParser, Delta, Reasoning, Text, ToolArguments, ToolCallStart, joined
from .logprobs import TokenNames
from .running import Usage


class ChatAnswer:
    """Turns tokens into pieces of an answer, and puts these together.

    Attributes:
        ended: whether the answer is at its end, which a second call is where ``parallel`` is false.
        unused: how many tokens came behind that end.

    Args:
        parser: of this answer.
        parallel: whether an answer may have several calls of tools.
        names: of tokens, where their log-probabilities are wanted.
    """

    def __init__(self, parser: AnswerParser, parallel: bool, names: TokenNames | None):
        self._parser, self._parallel, self._names = parser, parallel, names
        self._reasoning, self._text = list[str](), list[str]()
        self._calls: list[dict[str, Any]] = []
        self._logprobs, self._unsent = list[dict[str, Any]](), list[dict[str, Any]]()
        self._reason: str | None = None
        self.ended, self.unused = False, 0

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens were reasoning."""
        return self._parser.reasoning_tokens

    def feed(self, tokens: Sequence[GeneratedToken]) -> list[dict[str, Any]]:
        """The choices of the chunks that tokens make ready, the last with its reason.

        Pieces of one kind are joined, but for those of tokens with log-probabilities.
        """
        pieces, deltas = list[dict[str, Any]](), list[Delta]()
        for i, token in enumerate(tokens, start=1):
            deltas += self._deltas(token)
            if self._names is not None or self.ended or i == len(tokens):
                pieces += self._pieces(joined(deltas))
                deltas = []
            if self.ended:
                self.unused = len(tokens) - i
                break
        return pieces

    def _deltas(self, token: GeneratedToken) -> list[Delta]:
        """What a token adds, up to the answer's end."""
        if self._names is not None and not self._silent(token):
            self._unsent.append(self._names.chat(token))
        deltas = self._parser.feed(token)
        if token.finish_reason is not None:
            deltas = [*deltas, *self._parser.finish()]
            self._reason, self.ended = token.finish_reason, True
        for i, delta in enumerate(deltas):
            if isinstance(delta, ToolCallStart) and delta.index and not self._parallel:
                self._reason, self.ended = "stop", True
                return deltas[:i]
        return deltas

    def _pieces(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """Pieces as chunks have them; log-probabilities go with the next that is ready."""
        pieces: list[dict[str, Any]] = [{"delta": self._take(delta)} for delta in deltas]
        if self.ended:
            pieces.append({"delta": {}, "finish_reason": self._finish_reason()})
        if self._unsent and pieces:
            pieces[0]["logprobs"] = {"content": self._unsent}
            self._logprobs += self._unsent
            self._unsent = []
        return pieces

    def choice(self) -> dict[str, Any]:
        """The whole answer, as chat/completions has it in ``choices``."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._text)}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = [_whole(call) for call in self._calls]
            message["content"] = message["content"] or None
        listed = {"content": self._logprobs} if self._names is not None else None
        return {"message": message, "logprobs": listed, "finish_reason": self._finish_reason()}

    def _silent(self, event: GeneratedToken) -> bool:
        """Whether it is the token that ends a text, and none of it."""
        assert self._names is not None
        return event.finish_reason == "stop" and self._names.ends(event.token)

    def _finish_reason(self) -> str | None:
        return "tool_calls" if self._calls and self._reason == "stop" else self._reason

    def _take(self, delta: Delta) -> dict[str, Any]:
        """Keep a piece for the whole answer; returns it as a chunk has it."""
        if isinstance(delta, Reasoning):
            self._reasoning.append(delta.text)
            return {"reasoning_content": delta.text}
        if isinstance(delta, Text):
            self._text.append(delta.text)
            return {"content": delta.text}
        if isinstance(delta, ToolCallStart):
            self._calls.append({"id": delta.id, "name": delta.name, "arguments": []})
            function: dict[str, Any] = {"name": delta.name, "arguments": ""}
            call = {"index": delta.index, "id": delta.id, "type": "function", "function": function}
            return {"tool_calls": [call]}
        assert isinstance(delta, ToolArguments)
        self._calls[delta.index]["arguments"].append(delta.json_piece)
        function = {"arguments": delta.json_piece}
        return {"tool_calls": [{"index": delta.index, "function": function}]}


def usage(counts: Sequence[Usage], reasoning: int | None = None) -> dict[str, Any]:
    """The tokens of a call, of which a prompt counts once for all its answers."""
    prompt, generated = counts[0].prompt, sum(count.generated for count in counts)
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": counts[0].cached},
    }
    if reasoning is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return found


def _whole(call: dict[str, Any]) -> dict[str, Any]:
    function = {"name": call["name"], "arguments": "".join(call["arguments"])}
    return {"id": call["id"], "type": "function", "function": function}
