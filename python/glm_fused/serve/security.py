"""Who may use the server: the right host name, pages of its own, and those who know the key."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..validation import show
from .errors import ApiError, respond
from .settings import Settings

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/", "/health")  # what needs no key, besides the page's own files
PAGE = "/page/"


class Guard:
    """Lets through, to an ASGI application, the requests that ``settings`` allow.

    A page elsewhere can have a browser send requests here. One that has a name of its own resolve
    to this machine (DNS rebinding) betrays itself by the Host header, any other by Origin.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings
        self._key = None if settings.api_key is None else _digest(settings.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self._refusal(scope)
            if error is not None:
                await respond(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._knows(host):
            text = f"Host is {show(host)}, which is no name of this server (--allowed-host adds it)"
            return ApiError(403, f"{text}.", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not self._welcome(origin, host):
            text = f"Origin is {show(origin)}, whose pages may not use this server (--cors-origin)"
            return ApiError(403, f"{text}.", code="origin_not_allowed")
        if self._key is None or _is_open(scope) or self._has_key(headers):
            return None
        found = "not the right one" if _given(headers) else "missing"
        text = f"The API key is {found}: expected in Authorization: Bearer KEY, or in x-api-key."
        bearer = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, text, code="invalid_api_key", headers=bearer)

    def _knows(self, host: str) -> bool:
        name = _without_port(host).lower()
        mine = {*LOOPBACK, *(known.lower() for known in self._settings.allowed_hosts)}
        mine.add(_in_url(self._settings.host).lower())
        # An address as such cannot be rebound; only others' names can.
        return name in mine or (not self._settings.local and _is_address(name))

    def _welcome(self, origin: str, host: str) -> bool:
        allowed = self._settings.cors_origins
        if "*" in allowed or origin in allowed:
            return True
        try:
            return urlsplit(origin).netloc.lower() == host.lower() and host != ""
        except ValueError:
            return False

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        return any(hmac.compare_digest(_digest(key), self._key) for key in _given(headers))


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in OPEN or path.startswith(PAGE))


def _given(headers: Headers) -> list[str]:
    """The keys that a request has."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    keys = [key.strip()] if scheme.lower() == "bearer" else []
    return [key for key in (*keys, headers.get("x-api-key", "")) if key]


def _digest(key: str) -> bytes:
    """Of equal length for all keys, so that comparing them does not tell how long the right is."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.partition(":")[0]


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
