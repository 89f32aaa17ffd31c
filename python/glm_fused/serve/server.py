"""Listens, with patience that has limits, and ends gracefully."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from .settings import Settings

_HEADER_BYTES = 64 << 10
_FAREWELL = 2  # seconds in which clients whose requests are ended can read that they are


def bind(settings: Settings) -> socket.socket:
    """A socket with the address that ``settings`` name, on which nothing listens yet.

    So an address that cannot be had is known before a model is loaded, and nobody can connect
    before it is. Raises OSError, naming the address.
    """
    host, port = settings.host, settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}.") from None
    return sock


def url(sock: socket.socket) -> str:
    """Where a browser or a client finds the server."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Runs an application until it is told to end, by ``should_exit`` or a signal.

    Then nobody else can connect, and running requests have ``settings.grace`` seconds to end
    before each gets an error that says why it ends. A second signal ends the process at once.

    Args:
        app: what `create_app` made.
        settings: its settings.
        on_start: called when clients can connect.
    """

    def __init__(
        self, app: Starlette, settings: Settings, on_start: Callable[[], None] = lambda: None
    ):
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=_protocol(settings.timeout),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=settings.grace + _FAREWELL,
                h11_max_incomplete_event_size=_HEADER_BYTES,
            )
        )
        self._on_start, self._grace, self._service = on_start, settings.grace, app.state.service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening."""
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let nobody else connect, and end what still runs after its grace."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._service.end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End gracefully at the first signal, and at once at the second."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        name = signal.Signals(sig).name
        print(
            f"{name}: running requests have {self._grace} s to end; again to end at once.",
            file=sys.stderr,
        )


def _protocol(timeout: float) -> type[asyncio.Protocol]:
    """HTTP/1.1 that drops clients which, for ``timeout`` seconds, neither ask nor read."""

    class Protocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self._waits: dict[str, asyncio.TimerHandle] = {}

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._drop_later("request")

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            for what in list(self._waits):
                self._stay(what)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is None or self.cycle.response_complete:  # part of a request's head
                self._drop_later("request")
            else:
                self._stay("request")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._drop_later("reading")

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stay("reading")

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._drop_if_closing()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._drop_if_closing()

        def _drop_if_closing(self) -> None:
            """What is written is still sent to a client, if it reads it."""
            if self.transport.is_closing():
                self._drop_later("end")

        def _drop_later(self, what: str) -> None:
            if what not in self._waits:
                self._waits[what] = self.loop.call_later(timeout, self.transport.abort)

        def _stay(self, what: str) -> None:
            if (wait := self._waits.pop(what, None)) is not None:
                wait.cancel()

    return cast(type[asyncio.Protocol], Protocol)
