"""Requests between their last byte and the scheduler's queue, for which others' prompts wait."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Expect = Callable[[int], None]


class Arrival:
    """A request; it counts as on its way from `begin` until `end`, which may come several times."""

    def __init__(self, expect: Expect):
        self._expect, self._counts = expect, False

    def begin(self) -> None:
        """All of it is here."""
        if not self._counts:
            self._counts = True
            self._expect(1)

    def end(self) -> None:
        """It is in the queue, or never will be."""
        if self._counts:
            self._counts = False
            self._expect(-1)


arrival: ContextVar[Arrival | None] = ContextVar("arrival", default=None)


class Arrivals:
    """Says which requests to an ASGI application will soon be in the scheduler's queue.

    Those are requests with a body, once it has come whole: a client that sends it slowly keeps
    nobody waiting. Whoever puts one in the queue calls `Arrival.end`.

    Args:
        app: the application.
        expect: the scheduler's.
    """

    def __init__(self, app: ASGIApp, expect: Expect):
        self._app, self._expect = app, expect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        own = Arrival(self._expect)

        async def watched() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                own.begin()
            return message

        arrival.set(own)
        try:
            await self._app(scope, watched, send)
        finally:
            own.end()
