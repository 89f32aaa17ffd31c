"""Bounds what clients may ask for at once, and the size and time of a request's body."""

from __future__ import annotations

import asyncio
from typing import Any

import pydantic_core
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from ..memory import size
from ..validation import show
from .errors import ApiError, respond
from .settings import Settings


class Crowd:
    """Lets at most ``most`` requests with a body be in an ASGI application at once.

    Those beyond are told to come again (503) before their bodies are read, which take memory too.
    """

    def __init__(self, app: ASGIApp, most: int):
        self._app, self._most, self._inside = app, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if self._inside >= self._most:
            text = f"{self._most} requests are being answered or wait already."
            headers = {"Retry-After": "1", "Connection": "close"}
            error = ApiError(503, text, code="queue_full", headers=headers)
            await respond(error, scope["path"])(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside -= 1


async def read_json(request: Request, settings: Settings) -> dict[str, Any]:
    """The body of a request, a JSON object.

    Raises ApiError: 415 for another content type, 413 for a body beyond the limit, 408 for one
    that takes too long to come, 400 for what is no JSON object.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"Content-Type is {show(kind)}, expected application/json.")
    body = await _read(request, settings)
    try:
        found = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"The body is {show(found)}, expected a JSON object.")
    return found


async def _read(request: Request, settings: Settings) -> bytes:
    limit = settings.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    parts, total = [], 0
    try:
        async with asyncio.timeout(settings.timeout):
            async for part in request.stream():
                parts.append(part)
                total += len(part)
                if total > limit:
                    raise _too_large(limit)
    except TimeoutError:
        text = f"The body did not come within {settings.timeout:g} seconds."
        raise ApiError(408, text, headers={"Connection": "close"}) from None
    return b"".join(parts)


def _too_large(limit: int) -> ApiError:
    text = f"The body is larger than {size(limit)}, the most that this server takes."
    return ApiError(413, text, headers={"Connection": "close"})
