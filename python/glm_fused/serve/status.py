"""Whether the server is well, and its numbers."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .metrics import CONTENT_TYPE
from .service import Service


def routes(service: Service) -> list[Route]:
    """``/health``, which needs no key, and ``/metrics``, which Prometheus reads."""

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": service.settings.name})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return [
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]
