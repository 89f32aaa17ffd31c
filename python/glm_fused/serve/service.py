"""What every route of the server uses: the model, its scheduler, and the settings."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from ..engine import Engine
from ..generation.batching.requests import GenerationRequest
from ..generation.batching.scheduler import QueueFull, Scheduler
from ..generation.options import Options
from ..generation.prompt_cache.store import PromptStore
from ..generation.prompts import ContextExceeded, room
from ..validation import show
from .activity import Activity
from .arrivals import arrival
from .conversation import Conversation
from .delivery import Delivery
from .errors import ApiError
from .log import entry
from .metrics import Metrics
from .running import Running
from .settings import Settings

Result = TypeVar("Result")
_PREPARERS = 4  # threads that render and tokenize prompts


class Service:
    """A model that is served.

    Each API is a module with ``routes(service) -> list[Route]``. A route reads its body with
    `limits.read_json`, checks the name of the model with `check_model`, makes prompts with
    `prepare`, and hands requests to `start`; `streams` turns what comes into a response. What it
    raises, `ApiError` foremost, becomes an error in the shape of its API.

    Attributes:
        engine, scheduler, settings, metrics: what their names say.
        activity: the requests that run now, which `start` hands to the scheduler through it.
        conversation: makes prompts of messages, and answers of tokens.
        started: when it was made, in seconds since 1970.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        scheduler: Scheduler,
        delivery: Delivery,
        store: PromptStore | None = None,
    ):
        self.engine, self.settings, self.scheduler = engine, settings, scheduler
        self._store = store
        self.activity = Activity(
            lambda request, receive: scheduler.submit(request, delivery.to(receive))
        )
        self.conversation = Conversation(engine.model, engine.tokenizer)
        self.metrics = Metrics(scheduler.describe)
        self.started = int(time.time())
        self._running, self._ending = weakref.WeakSet[Running](), False
        self._preparers = ThreadPoolExecutor(_PREPARERS, "glm-fused prompts")

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) unless ``name`` is one of the served model's."""
        if name not in self.settings.names:
            names = ", ".join(self.settings.names)
            text = f"model is {show(name)}, which is not served here; there is {names}."
            raise ApiError(404, text, param="model", code="model_not_found")

    async def prepare(self, make: Callable[[], Result], param: str | None = None) -> Result:
        """What ``make`` returns, in another thread, because it may take long.

        Raises ApiError (400, about the field ``param``) for a ValueError.
        """
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._preparers, make)
        except ValueError as error:
            raise _refused(error, param) from None

    def options(self, **given: Any) -> Options:
        """The checkpoint's options with those ``given`` that are not None, by `Options`' names.

        Raises ApiError (400) for a value that an option cannot have.
        """
        found = {name: value for name, value in given.items() if value is not None}
        try:
            return replace(self.engine.defaults, **found)
        except ValueError as error:
            raise ApiError(400, plain(error)) from None

    def max_tokens(self, prompt: int, wanted: int | None, param: str = "max_tokens") -> int:
        """How many tokens to generate after a prompt of so many, where a request wants as many.

        Raises ApiError (400) where both do not fit in the context.
        """
        left = self.engine.context - prompt
        if wanted is None:
            most = self.settings.max_tokens
            wanted = left if most is None else min(most, left)
        try:
            return room(self.engine.model, prompt, wanted)
        except ValueError as error:
            raise _refused(error, param) from None

    def start(self, requests: Sequence[GenerationRequest]) -> Running:
        """Have requests generated, all or none; iterate what is returned, or cancel it.

        Raises ApiError: 400 for a prompt that does not fit the model, 429 where too many wait, 503
        once the server ends; and SchedulerEnded where nothing is generated any more.
        """
        if self._ending:
            raise _too_late()
        submit, limit = self.activity.submit, self.settings.time_limit
        most = self.settings.max_batch + self.settings.max_queue
        if len(requests) > most:
            text = f"n: found {len(requests)} texts to generate, expected at most {most}."
            raise ApiError(400, text, param="n")
        try:
            running = Running(requests, submit, limit, self.metrics)
        except QueueFull as error:
            text, wait = plain(error), {"Retry-After": "1"}
            raise ApiError(429, text, code="queue_full", headers=wait) from None
        except ValueError as error:
            raise _refused(error) from None
        finally:
            if (own := arrival.get()) is not None:
                own.end()
        self._running.add(running)
        if (line := entry.get()) is not None:
            line.usage = running.usage
        return running

    def end(self) -> None:
        """Have requests that run, wait or come later fail (503), because the server ends."""
        self._ending = True
        for running in list(self._running):
            running.fail(_too_late())

    def close(self) -> None:
        """End the scheduler and what it works on."""
        self.scheduler.close()
        self._preparers.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()


def _too_late() -> ApiError:
    return ApiError(503, "The server is ending.", code="server_ending")


def _refused(error: ValueError, param: str | None = None) -> ApiError:
    code = "context_length_exceeded" if isinstance(error, ContextExceeded) else None
    return ApiError(400, plain(error), param=param, code=code)


def plain(error: Exception) -> str:
    """What an error says, without the name of the part that says it."""
    text = str(error)
    return text.partition("] ")[2] if text.startswith("[") and "] " in text else text
