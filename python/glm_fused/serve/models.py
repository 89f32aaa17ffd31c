"""The list of models, in OpenAI's shape and Anthropic's: one, under each of its names."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .service import Service


def routes(service: Service) -> list[Route]:
    """``/v1/models`` and each of them by its name."""

    async def all_of_them(request: Request) -> Response:
        models = [_model(service, name) for name in service.settings.names]
        ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]}
        return JSONResponse({"object": "list", "data": models, "has_more": False} | ends)

    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        service.check_model(name)
        return JSONResponse(_model(service, name))

    return [
        Route("/v1/models", all_of_them, methods=["GET"]),
        Route("/v1/models/{name:path}", one, methods=["GET"]),
    ]


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "glm-fused",
        "context_window": service.engine.context,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(service.started, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": service.engine.context,
    }
