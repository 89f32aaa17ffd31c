"""An answer as Anthropic's messages API says it: events of a stream, and the message they make."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from .answers import Delta, Reasoning, Text, ToolArguments, ToolCallStart

Event = dict[str, Any]
SIGNATURE = "unsigned"  # clients hand thinking back with its signature, which nobody checks here


def usage(prompt: int, cached: int, generated: int, reasoning: int) -> dict[str, Any]:
    """Tokens as Anthropic counts them: what was cached is no part of ``input_tokens``."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
        "output_tokens_details": {"thinking_tokens": reasoning},
    }


class MessageEvents:
    """Makes the events of one message, in the order start, feed…, finish.

    Args:
        message_id: what the message is called.
        model: the name of the model.
        show_thinking: whether thinking has its text; where not, its block is empty.

    Attributes:
        message: the message so far, with usage and reason once it is finished.
    """

    def __init__(self, message_id: str, model: str, show_thinking: bool = True):
        self._show_thinking = show_thinking
        self._json: list[str] = []
        self._open = False
        self.message: dict[str, Any] = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": None,
        }

    def start(self, used: dict[str, Any]) -> list[Event]:
        """The first event; ``used`` are the tokens before the first generated one."""
        self.message["usage"] = used
        return [{"type": "message_start", "message": self.message | {"content": []}}]

    def feed(self, deltas: Sequence[Delta]) -> list[Event]:
        """The events of more of the answer."""
        return [event for delta in deltas for event in self._events(delta)]

    def finish(
        self, stop_reason: str, stop_sequence: str | None, used: dict[str, Any]
    ) -> list[Event]:
        """The last events."""
        why = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        self.message.update(why, usage=used)
        last: list[Event] = [
            {"type": "message_delta", "delta": why, "usage": used},
            {"type": "message_stop"},
        ]
        return [*self._close(), *last]

    @property
    def _content(self) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = self.message["content"]
        return content

    def _events(self, delta: Delta) -> Iterator[Event]:
        match delta:
            case Text(text):
                yield from self._within("text", {"text": ""})
                self._content[-1]["text"] += text
                yield self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                yield from self._within("thinking", {"thinking": "", "signature": ""})
                if self._show_thinking:
                    self._content[-1]["thinking"] += text
                    yield self._delta({"type": "thinking_delta", "thinking": text})
            case ToolCallStart(_, call_id, name):
                yield from self._begin("tool_use", {"id": call_id, "name": name, "input": {}})
            case ToolArguments(_, piece):
                self._json.append(piece)
                yield self._delta({"type": "input_json_delta", "partial_json": piece})

    def _within(self, kind: str, empty: dict[str, Any]) -> Iterator[Event]:
        """What leads to a block of this kind, if the last one is of another."""
        if not self._open or self._content[-1]["type"] != kind:
            yield from self._begin(kind, empty)

    def _begin(self, kind: str, empty: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self._content.append({"type": kind} | empty)
        self._json, self._open = [], True
        block = dict(self._content[-1])
        index = len(self._content) - 1
        yield {"type": "content_block_start", "index": index, "content_block": block}

    def _close(self) -> Iterator[Event]:
        if not self._open:
            return
        self._open, block = False, self._content[-1]
        if block["type"] == "thinking":
            block["signature"] = SIGNATURE
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        elif block["type"] == "tool_use":
            block["input"] = json.loads("".join(self._json) or "{}")
        yield {"type": "content_block_stop", "index": len(self._content) - 1}

    def _delta(self, delta: dict[str, Any]) -> Event:
        index = len(self._content) - 1
        return {"type": "content_block_delta", "index": index, "delta": delta}
