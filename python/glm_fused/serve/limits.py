"""Reads the body of a request: JSON, of bounded size, in bounded time."""

from __future__ import annotations

import asyncio
from typing import Any

import pydantic_core
from starlette.requests import Request

from ..memory import size
from ..validation import show
from .errors import ApiError
from .settings import Settings


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
