"""One line for every request, for people or as JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import GONE
from .metrics import Metrics
from .running import Usage

logger = logging.getLogger("glm_fused.requests")

_TEXT = (
    "%(client)s %(method)s %(path)r %(status)s, %(seconds).3f s, %(prompt_tokens)s prompt tokens"
    " (%(cached_tokens)s at hand), %(generated_tokens)s generated"
)


@dataclass
class Entry:
    """What is known of a request so far."""

    usage: Sequence[Usage] = ()


entry: ContextVar[Entry | None] = ContextVar("entry", default=None)


class Log:
    """Counts and logs the requests to an ASGI application, once each has its answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, ended, found, began = GONE, False, Entry(), time.perf_counter()

        async def watch(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        entry.set(found)
        try:
            await self._app(scope, receive, watch)
        finally:
            seconds = time.perf_counter() - began
            status = status if ended else GONE
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(route, scope["method"], status, seconds)
            fields = _fields(scope, status, seconds, found.usage)
            logger.info(_TEXT, fields, extra={"fields": fields})


def _fields(scope: Scope, status: int, seconds: float, usage: Sequence[Usage]) -> dict[str, Any]:
    client = scope.get("client") or ("?",)
    return {
        "client": client[0],
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 4),
        "prompt_tokens": sum(u.prompt for u in usage),
        "cached_tokens": sum(u.cached for u in usage),
        "generated_tokens": sum(u.generated for u in usage),
    }


class JsonLines(logging.Formatter):
    """Each record as one JSON object in a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time and level, and the fields of its request or what it says."""
        fields = getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            fields = fields | {"traceback": self.formatException(record.exc_info)}
        common = {"time": round(record.created, 3), "level": record.levelname.lower()}
        return json.dumps(common | fields, ensure_ascii=True)


def set_up(as_json: bool, every_request: bool) -> None:
    """Have this package and uvicorn log to stderr: warnings, and requests where they are wanted."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handler.setFormatter(JsonLines() if as_json else plain)
    handler.addFilter(_is_news)
    for name in ("glm_fused", "uvicorn"):
        logging.getLogger(name).addHandler(handler)
    logger.setLevel(logging.INFO if every_request or as_json else logging.WARNING)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record says more than that a request was cancelled when the server ended."""
    return record.exc_info is None or not isinstance(record.exc_info[1], asyncio.CancelledError)
