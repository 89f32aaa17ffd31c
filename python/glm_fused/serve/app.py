"""The application that `glm-fused serve` runs: all routes, and what each request passes first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from ..engine import Engine
from ..generation.batching.leading import Others
from ..generation.batching.scheduler import Scheduler
from ..generation.prompt_cache.store import PromptStore
from . import (
    anthropic_messages,
    models,
    openai_chat,
    openai_completions,
    page,
    responses,
    stats,
    status,
)
from .arrivals import Arrivals
from .delivery import Delivery
from .errors import ApiError, Errors, on_error
from .limits import Crowd
from .log import Log
from .security import Guard
from .service import Service
from .settings import Settings

APIS = (
    page,
    stats,
    status,
    models,
    openai_chat,
    openai_completions,
    responses,
    anthropic_messages,
)
SPARE = 64  # requests that may be read or counted while as many as there may be run and wait


def create_app(engine: Engine, settings: Settings, others: Others | None = None) -> Starlette:
    """An application that serves ``engine``, which stays open until the application has ended.

    ``others`` are the ranks that share its model; None: there are none. The application's
    ``state.service`` is its `Service`. Its scheduler ends with its lifespan.
    """
    store, delivery = _store(engine, settings), Delivery()
    scheduler = Scheduler(
        engine,
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        store=store,
        after_events=delivery.flush,
        others=others,
    )
    service = Service(engine, settings, scheduler, delivery, store)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)  # which waits for the step that is running

    handled = (ApiError, HTTPException, ClientDisconnect)
    app = Starlette(
        routes=[route for api in APIS for route in api.routes(service)],
        middleware=_middleware(service, settings),
        exception_handlers=dict.fromkeys(handled, on_error),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


def _store(engine: Engine, settings: Settings) -> PromptStore | None:
    if not engine.options.prompt_cache_bytes:
        return None
    return engine.prompt_store(folder=settings.prompt_cache_dir)


def _middleware(service: Service, settings: Settings) -> list[Middleware]:
    """From the outermost in: the log sees every request, CORS lets pages read errors too."""
    found = [Middleware(Log, metrics=service.metrics)]
    if settings.cors_origins:
        origins, every = list(settings.cors_origins), ["*"]
        found.append(
            Middleware(
                CORSMiddleware, allow_origins=origins, allow_methods=every, allow_headers=every
            )
        )
    most = settings.max_batch + settings.max_queue + SPARE
    guard, crowd = Middleware(Guard, settings=settings), Middleware(Crowd, most=most)
    arrivals = Middleware(Arrivals, expect=service.scheduler.expect)
    return [*found, guard, crowd, arrivals, Middleware(Errors)]
