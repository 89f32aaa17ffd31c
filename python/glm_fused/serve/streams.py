"""Answers while their client waits: streams of events, and whole ones that end when it leaves."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from .errors import GONE, ApiError, as_api_error, shape_of
from .running import Running

MOST_AT_ONCE = 256  # events in one piece
KEEP_ALIVE = 10.0  # seconds without an event, after which clients hear that they are waited for
_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_MARK = uuid.uuid4().hex  # nothing that is sent has it
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # of proxies that hold back


def data(document: object, event: str | None = None) -> str:
    """A server-sent event, with its name where the API has names."""
    named = "" if event is None else f"event: {event}\n"
    return f"{named}data: {_json(document)}\n\n"


def comment(text: str) -> str:
    """What clients skip, but which keeps a connection alive."""
    return f": {text}\n\n"


class Template:
    """Makes events that differ in one text, without building the rest of them anew.

    Args:
        make: the document of a text, which it has in one place, as it is.
    """

    def __init__(self, make: Callable[[str], object]):
        self._before, self._after = data(make(_MARK)).split(_json(_MARK))

    def __call__(self, text: str) -> str:
        """The event that `data` makes of the text's document."""
        return f"{self._before}{_json(text)}{self._after}"


class EventStream(StreamingResponse):
    """Sends server-sent events as they come, and ends what it runs when the client goes away.

    While none comes, as in the queue, a comment every `KEEP_ALIVE` seconds keeps clients and
    proxies from taking the connection for dead.

    Args:
        path: of the request, whose API says how an error looks.
        running: what the events come from; it is cancelled at the end, whatever the end is.
        events: the events, made by `data` and `comment`. What it raises becomes one more event.
        named: whether the API's events have names, an error's being "error".
    """

    media_type = "text/event-stream"

    def __init__(
        self, path: str, running: Running, events: AsyncGenerator[str], named: bool = False
    ):
        self._events = self._safely(path, events, named)
        super().__init__(self._events, headers=_HEADERS)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()
            await self._events.aclose()

    async def stream_response(self, send: Send) -> None:
        """Send the response's head, and its events until there are no more.

        Those that are at hand at the same time go in one piece.
        """
        loop, keeper, ready = asyncio.get_running_loop(), None, list[str]()
        sent = loop.time()

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(sent + KEEP_ALIVE - loop.time())
                if loop.time() >= sent + KEEP_ALIVE:
                    body = comment("waiting").encode()
                    await noted({"type": "http.response.body", "body": body, "more_body": True})

        async def noted(message: Message) -> None:
            nonlocal sent, keeper
            await send(message)
            sent = loop.time()
            keeper = keeper or asyncio.ensure_future(keep_alive())

        async def send_ready() -> None:
            if ready:
                body = "".join(ready).encode()
                ready.clear()
                await noted({"type": "http.response.body", "body": body, "more_body": True})

        start = {"type": "http.response.start", "status": self.status_code}
        try:
            await noted(start | {"headers": self.raw_headers})
            self._running.before_wait = send_ready
            async for event in self._events:
                ready.append(event)
                if len(ready) >= MOST_AT_ONCE:
                    await send_ready()
            await send_ready()
            await noted({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if keeper is not None:
                keeper.cancel()

    async def _safely(
        self, path: str, events: AsyncGenerator[str], named: bool
    ) -> AsyncGenerator[str]:
        async with aclosing(events):
            try:
                async for event in events:
                    yield event
            except Exception as error:
                found = as_api_error(error)
                yield data(shape_of(path)(found), "error" if named else None)


async def while_waiting(request: Request, running: Running, answer: Awaitable[Any]) -> Any:
    """The answer, unless the client goes away first: then what runs is cancelled.

    Raises ApiError where the client went away, and what ``answer`` raises.
    """
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(GONE, "The client went away.")
        return work.result()
    finally:
        running.cancel()
        gone.cancel()
        work.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
