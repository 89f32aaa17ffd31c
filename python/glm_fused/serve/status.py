"""Whether the server is well, and its numbers."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .metrics import CONTENT_TYPE
from .service import Service


def routes(service: Service) -> list[Route]:
    """``/health``, which needs no key, and ``/metrics``, which Prometheus reads.

    The server is well while it can generate; where it is not, ``/health`` answers with 503.
    """

    async def health(request: Request) -> Response:
        alive = service.scheduler.alive
        status = {"status": "ok" if alive else "failed", "model": service.settings.name}
        return JSONResponse(status, 200 if alive else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return [
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]
