"""An answer as OpenAI's responses API says it: events of a stream, and the response they make."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

from .answers import Delta, Reasoning, Text, ToolArguments, ToolCallStart
from .errors import ApiError

Event = dict[str, Any]


def usage(prompt: int, cached: int, generated: int, reasoning: int) -> dict[str, Any]:
    """Tokens as OpenAI counts them: what was cached is part of ``input_tokens``."""
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + generated,
    }


class ResponseEvents:
    """Makes the events of one response, in the order start, feed…, and finish or fail.

    Args:
        response: what is known of the response before there is any of it.

    Attributes:
        response: the response so far.
    """

    def __init__(self, response: dict[str, Any]):
        self.response = response | {"output": [], "status": "in_progress"}
        self._output: list[dict[str, Any]] = self.response["output"]
        self._sequence, self._open = 0, False
        self._unsent: list[Any] = []  # log-probabilities of tokens that made no text ready yet

    def start(self) -> list[Event]:
        """The first events."""
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=copy.deepcopy(self.response)) for kind in kinds]

    def feed(self, deltas: Sequence[Delta], logprobs: Sequence[Any] = ()) -> list[Event]:
        """The events of more of the answer; log-probabilities go with the next of its text."""
        self._unsent.extend(logprobs)
        return [event for delta in deltas for event in self._events(delta)]

    def finish(self, incomplete: str | None, used: dict[str, Any]) -> list[Event]:
        """The last events; ``incomplete`` says why the answer is, or is None."""
        status = "completed" if incomplete is None else "incomplete"
        events = list(self._close(status))
        self.response.update(status=status, usage=used)
        if incomplete is None:
            self.response["completed_at"] = int(time.time())
        else:
            self.response["incomplete_details"] = {"reason": incomplete}
        return [*events, self._event(f"response.{status}", response=self.response)]

    def fail(self, error: ApiError) -> list[Event]:
        """The last event of an answer that an error ends."""
        code = "invalid_prompt" if error.status < 500 else "server_error"
        said = {"code": code, "message": error.message}
        self.response.update(status="failed", error=said)
        return [self._event("response.failed", response=self.response)]

    def _events(self, delta: Delta) -> Iterator[Event]:
        if not isinstance(delta, Text):
            self._unsent = []  # only texts have log-probabilities
        match delta:
            case Text(text):
                empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
                yield from self._within("message", "msg", {"role": "assistant"}, empty)
                logprobs, self._unsent = self._unsent, []
                self._part["logprobs"].extend(logprobs)
                yield self._more("response.output_text.delta", text, logprobs=logprobs)
            case Reasoning(text):
                empty = {"type": "reasoning_text", "text": ""}
                yield from self._within("reasoning", "rs", {"summary": []}, empty)
                yield self._more("response.reasoning_text.delta", text)
            case ToolCallStart(_, call_id, name):
                call = {"call_id": call_id, "name": name, "arguments": ""}
                yield from self._begin("function_call", "fc", call)
            case ToolArguments(_, piece):
                self._item["arguments"] += piece
                yield self._at("response.function_call_arguments.delta", delta=piece)

    @property
    def _item(self) -> dict[str, Any]:
        """The item that is being written."""
        return self._output[-1]

    @property
    def _part(self) -> dict[str, Any]:
        """The only part of its content."""
        part: dict[str, Any] = self._item["content"][0]
        return part

    def _within(
        self, kind: str, prefix: str, head: dict[str, Any], part: dict[str, Any]
    ) -> Iterator[Event]:
        """What leads to an item of this kind and its part, if another is being written."""
        if self._open and self._item["type"] == kind:
            return
        yield from self._begin(kind, prefix, head | {"content": []})
        self._item["content"].append(part)
        yield self._at("response.content_part.added", content_index=0, part=copy.deepcopy(part))

    def _begin(self, kind: str, prefix: str, parts: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        head = {"id": f"{prefix}_{uuid4().hex}", "type": kind, "status": "in_progress"}
        self._output.append(head | parts)
        self._open = True
        yield self._of_item("response.output_item.added", copy.deepcopy(self._item))

    def _more(self, kind: str, text: str, **also: Any) -> Event:
        self._part["text"] += text
        return self._at(kind, content_index=0, delta=text, **also)

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that is being written, if there is one."""
        if not self._open:
            return
        self._open, item = False, self._item
        item["status"] = status
        if item["type"] == "function_call":
            yield self._at("response.function_call_arguments.done", arguments=item["arguments"])
        else:
            part, also = self._part, {}
            if item["type"] == "message":
                also["logprobs"] = part["logprobs"]
            text = {"content_index": 0, "text": part["text"]}
            yield self._at(f"response.{part['type']}.done", **text, **also)
            yield self._at("response.content_part.done", content_index=0, part=part)
        yield self._of_item("response.output_item.done", item)

    def _at(self, kind: str, **parts: Any) -> Event:
        """An event within the item that is being written."""
        index = len(self._output) - 1
        return self._event(kind, item_id=self._item["id"], output_index=index, **parts)

    def _of_item(self, kind: str, item: dict[str, Any]) -> Event:
        return self._event(kind, output_index=len(self._output) - 1, item=item)

    def _event(self, kind: str, **parts: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **parts}
        self._sequence += 1
        return event
