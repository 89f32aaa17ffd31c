"""What goes wrong with a request, and how each API says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..generation.batching.scheduler import SchedulerEnded
from ..validation import show

logger = logging.getLogger("glm_fused.serve")

_READS = "[slots] "  # what errors of reading an expert's weights begin with
GONE = 499  # of a client that no longer waits for an answer; nobody sees it but the log
Shape = Callable[["ApiError"], dict[str, Any]]


class ApiError(Exception):
    """A request that gets no answer.

    Attributes:
        status: of HTTP.
        message: what was found and what was expected.
        param: the field at fault, such as "messages[0].role"; None where it is none.
        code: a word for programs, such as "model_not_found"; None without one.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})


def openai_shape(error: ApiError) -> dict[str, Any]:
    """An error as OpenAI's API says it."""
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
        error.status, "server_error" if error.status >= 500 else "invalid_request_error"
    )
    detail = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": detail}


_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_shape(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic's API says it."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _ANTHROPIC.get(error.status, usual)
    detail: dict[str, Any] = {"type": kind, "message": error.message}
    if error.code is not None:
        detail["details"] = {"error_code": error.code}
    return {"type": "error", "error": detail}


def shape_of(path: str) -> Shape:
    """How the API that has this path says what is wrong."""
    anthropic = path == "/v1/messages" or path.startswith("/v1/messages/")
    return anthropic_shape if anthropic else openai_shape


def respond(error: ApiError, path: str) -> Response:
    """The response to a request for ``path`` that fails so."""
    return JSONResponse(shape_of(path)(error), error.status, error.headers)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of any error; of faults that are ours the log has the details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, _http_message(error), headers=error.headers)
    if isinstance(error, ClientDisconnect):
        return ApiError(GONE, "The client went away.")
    if isinstance(error, SchedulerEnded):
        return ApiError(503, "The server does not generate any more.", code="unavailable")
    if isinstance(error, RuntimeError) and str(error).startswith(_READS):
        logger.error("a request failed: %s", error)
        text = "Weights of an expert could not be read; the server's log says which, and why."
        return ApiError(500, text, code="weights_not_read")
    logger.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    return ApiError(500, "The server failed on this request; its log says why.")


async def on_error(request: Request, error: Exception) -> Response:
    """What Starlette calls for the exceptions that are known."""
    found = as_api_error(error)
    if isinstance(error, HTTPException):
        found.message = f"{request.method} {request.url.path}: {found.message}"
    return respond(found, request.url.path)


class Errors:
    """Answers with an error where an ASGI application raises one that it does not handle itself.

    What fails once a response has begun can only be cut off.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watch(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if scope["type"] != "http" or begun:
                raise
            await respond(as_api_error(error), scope["path"])(scope, receive, send)


def _http_message(error: HTTPException) -> str:
    if error.status_code == 404:
        return "there is no such route."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return f"expected another method: {allowed}."
    return str(error.detail or HTTPStatus(error.status_code).phrase)


def invalid(error: ValidationError, body: object) -> ApiError:
    """What pydantic found wrong with a ``body``: the field, what it has and what was expected."""
    errors = error.errors(include_url=False)
    # Of alternatives that all fail, the one that gets furthest is the one that was meant.
    start = _path(errors[0], body)
    first = max(
        (e for e in errors if _path(e, body).startswith(start)), key=lambda e: len(e["loc"])
    )
    path = _path(first, body)
    same = [e for e in errors if _path(e, body) == path]
    text = f"{path}: {_complaint(first, same)}"
    if more := len(errors) - len(same):
        text += f" ({more} more faults of this body are not listed.)"
    return ApiError(400, text, param=path)


def _complaint(first: ErrorDetails, same: Sequence[ErrorDetails]) -> str:
    kind, found = first["type"], first["input"]
    if kind in ("missing", "union_tag_not_found"):
        return "required, but it is not there."
    if kind == "extra_forbidden":
        return "there is no such field."
    if kind == "union_tag_invalid":
        context = first["ctx"]
        return f"found {show(context['tag'])}, expected one of {context['expected_tags']}."
    wanted = dict.fromkeys(_expected(e["msg"]) for e in same)
    return f"found {show(found)}, expected {' or '.join(wanted)}."


def _path(error: ErrorDetails, body: object) -> str:
    """The place in the body, without the names of pydantic's alternatives."""
    text, here, loc = "", body, list(error["loc"])
    if error["type"].startswith("union_tag_"):
        loc.append(error["ctx"]["discriminator"].strip("'"))
    for i, part in enumerate(loc):
        if isinstance(part, int) and isinstance(here, list):
            text += f"[{part}]"
            here = here[part] if part < len(here) else None
        elif isinstance(here, dict) and (part in here or i == len(loc) - 1):
            text += f".{part}" if text else str(part)
            here = here.get(part)
    return text or "body"


def _expected(message: str) -> str:
    """What pydantic's message says was expected."""
    for start in ("Input should be ", "Value error, expected "):
        message = message.removeprefix(start)
    return message
