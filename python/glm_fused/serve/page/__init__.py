"""The live page: a chat and the server's numbers, in files that are sent as they lie."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "static"

# What a browser may do for the page: load this server's files and ask this server, nothing else.
# Scripts and styles in the document itself are refused, wherever they come from.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asks whether the file is still the same, at every load
}


def routes(service: object) -> list[BaseRoute]:
    """``/``, the page, and ``/page/``, the files that it needs, which are the same for any service.

    What the page shows it asks other routes for, with the key where the server wants one.
    """

    async def index(request: Request) -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    return [Route("/", index, methods=["GET"]), Mount("/page", _Files(directory=FOLDER))]


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
