"""The numbers that the live page shows."""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..memory import resident_bytes
from ..streaming.banks import Streaming
from .service import Service


def routes(service: Service) -> list[Route]:
    """``/stats``, which the page asks for once a second."""
    stats = Stats(service)

    async def show(request: Request) -> Response:
        headers = {"Cache-Control": "no-store"}
        return JSONResponse(stats.describe(), headers=headers)

    return [Route("/stats", show, methods=["GET"])]


class Stats:
    """What a service does now and has done, in numbers."""

    def __init__(self, service: Service):
        self._service = service
        streaming = service.engine.streaming
        self._slots = 0 if streaming is None else streaming.plan.slot_bytes
        self._weights = service.engine.model.weight_bytes - self._slots

    def describe(self) -> dict[str, Any]:
        """All of it, JSON-ready; bytes and seconds where a name does not say otherwise."""
        service = self._service
        scheduler, activity = service.scheduler.describe(), service.activity.describe()
        streaming = service.engine.streaming
        return activity | {
            "model": service.settings.name,
            "uptime_seconds": time.time() - service.started,
            "queued": scheduler["queued"],
            "max_batch": service.settings.max_batch,
            "memory": self._memory(scheduler),
            "experts": None if streaming is None else _experts(streaming),
            "drafts": scheduler.get("drafts"),
            "prompt_cache": scheduler.get("prompt_cache"),
        }

    def _memory(self, scheduler: dict[str, Any]) -> dict[str, int]:
        """Bytes by kind; what MLX holds besides those known is a step's, the rest the program's."""
        found = scheduler.get("memory", {})
        known = {
            "weights": self._weights,
            "slots": self._slots,
            "kv": found.get("caches", 0),
            "prompt_cache": found.get("store", 0),
        }
        held = mx.get_active_memory() + mx.get_cache_memory()
        known["scratch"] = max(held - sum(known.values()), 0)
        return known | {"other": max(resident_bytes() - sum(known.values()), 0)}


def _experts(streaming: Streaming) -> dict[str, Any]:
    """How often each layer's experts were in memory, and how often they had to be read."""
    layers = []
    for i, bank in streaming.banks.items():
        counts = bank.stats()
        hits, reads = counts["hits"], counts["misses"]
        rate = hits / (hits + reads) if hits + reads else None
        layers.append({"layer": i, "hit_rate": rate, "hits": hits, "reads": reads})
    return {"layers": layers, "slots": streaming.plan.slots}
