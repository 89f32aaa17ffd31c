"""Anthropic's messages API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .answering import Answering, prepare
from .anthropic_events import MessageEvents, usage
from .anthropic_requests import CountTokensBody, MessagesBody
from .anthropic_turn import check_messages, options_of, shows_thinking, turn_of
from .limits import read_json
from .openai_fields import checked
from .service import Service
from .streams import EventStream, data, while_waiting

PATH = "/v1/messages"


def routes(service: Service) -> list[Route]:
    """``/v1/messages`` and ``/v1/messages/count_tokens``."""

    async def messages(request: Request) -> Response:
        body = checked(MessagesBody, await read_json(request, service.settings), check_messages)
        service.check_model(body.model)
        answer = await _begin(service, body)
        if body.stream:
            return EventStream(PATH, answer.running, answer.events(), named=True)
        return JSONResponse(await while_waiting(request, answer.running, answer.whole()))

    async def count_tokens(request: Request) -> Response:
        body = checked(CountTokensBody, await read_json(request, service.settings))
        service.check_model(body.model)
        prepared = await prepare(service, turn_of(body), "messages")
        return JSONResponse({"input_tokens": len(prepared.tokens)})

    return [
        Route(PATH, messages, methods=["POST"]),
        Route(f"{PATH}/count_tokens", count_tokens, methods=["POST"]),
    ]


async def _begin(service: Service, body: MessagesBody) -> _Answer:
    turn = turn_of(body)
    prepared = await prepare(service, turn, "messages")
    # Anthropic's API takes any max_tokens, and says in the end that the context was full.
    room = max(service.engine.context - len(prepared.tokens), 1)
    most = service.max_tokens(len(prepared.tokens), min(body.max_tokens, room), "messages")
    options = service.options(max_tokens=most, **options_of(body))
    answering = Answering(service, prepared, options, turn.parallel)
    return _Answer(answering, body, "max_tokens" if most == body.max_tokens else FULL)


FULL = "model_context_window_exceeded"


class _Answer:
    """One message, whole or as events.

    Args:
        answering: generates it.
        body: what it answers.
        length: the reason to stop where there was no room for more.
    """

    def __init__(self, answering: Answering, body: MessagesBody, length: str):
        self.running, self._answering, self._length = answering.running, answering, length
        self._events = MessageEvents(f"msg_{uuid4().hex}", body.model, shows_thinking(body))

    async def whole(self) -> dict[str, Any]:
        """The message in one piece."""
        async for _ in self._all():
            pass
        return self._events.message

    async def events(self) -> AsyncGenerator[str]:
        """The message as server-sent events."""
        async for event in self._all():
            yield data(event, event["type"])

    async def _all(self) -> AsyncGenerator[dict[str, Any]]:
        answering, started = self._answering, False
        async for progress in answering.progress():
            if not started:
                started = True
                for event in self._events.start(self._usage()):
                    yield event
            if not progress.tokens:
                yield {"type": "ping"}
            for event in self._events.feed(progress.deltas):
                yield event
        for event in self._events.finish(self._reason(), answering.stop_text, self._usage()):
            yield event

    def _usage(self) -> dict[str, Any]:
        return usage(**self._answering.counts())

    def _reason(self) -> str:
        answering = self._answering
        if answering.reason == "length":
            return self._length
        if answering.calls:
            return "tool_use"
        return "end_turn" if answering.stop_text is None else "stop_sequence"
