"""Requests that a scheduler works on, as an asynchronous stream of their events."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from ..generation.batching.requests import (
    Event,
    Failure,
    GeneratedToken,
    GenerationRequest,
    OnEvent,
    PromptProgress,
    Ticket,
)
from .delivery import Delivery
from .errors import ApiError
from .metrics import Metrics

Submit = Callable[[GenerationRequest, OnEvent], Ticket]
MOST_EVENTS = 65_536  # that a client has not read yet


@dataclass
class Usage:
    """Tokens of one request: the prompt's, those of it that were at hand, and generated ones."""

    prompt: int
    cached: int = 0
    generated: int = 0


class Running:
    """Requests that run at once, for one client; iterating gives (index, event) until all end.

    It belongs to the event loop that made it. `cancel` ends what still runs, and has to be called
    by whoever stops iterating early.

    Attributes:
        usage: the tokens of each request so far.
        before_wait: is called, and waited for, where no event is at hand.

    Args:
        requests: what to generate.
        submit: hands one to the scheduler; what it raises passes through, with nothing left behind.
        seconds: how long all of it may take.
        metrics: is told of tokens and times.
        delivery: carries events from the scheduler's thread to the event loop.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        submit: Submit,
        seconds: float,
        metrics: Metrics,
        delivery: Delivery,
    ):
        self.usage = [Usage(len(request.tokens)) for request in requests]
        self.before_wait: Callable[[], Awaitable[None]] | None = None
        self._loop, self._metrics, self._delivery = asyncio.get_running_loop(), metrics, delivery
        self._events = deque[tuple[int, Event]]()
        self._waiter: asyncio.Future[None] | None = None
        self._seconds, self._late = seconds, False
        self._deadline = self._loop.call_later(seconds, self._expire)
        self._open = set(range(len(requests)))
        self._began = time.perf_counter()
        self._last: list[float | None] = [None] * len(requests)
        self._tickets: list[Ticket] = []
        try:
            for i, request in enumerate(requests):
                self._tickets.append(submit(request, self._receiver(i)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what still runs; nothing where all has ended."""
        for i, ticket in enumerate(self._tickets):
            if i in self._open:
                ticket.cancel()
        self._open.clear()
        self._deadline.cancel()

    def fail(self, error: ApiError) -> None:
        """End what still runs with an error, which comes after the events that are there."""
        if self._open:
            for index in self._open:
                self._tickets[index].cancel()
            self._put(min(self._open), Failure(error))

    def end(self, index: int) -> None:
        """End one request where it is: its answer is complete."""
        if index in self._open:
            self._tickets[index].cancel()
            self._close(index)
            self._metrics.ended("stop")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, PromptProgress | GeneratedToken]:
        """The next event; raises ApiError where a request fails or takes too long."""
        index = -1
        while index not in self._open:  # events of a request that was ended may be on their way
            if not self._open:
                raise StopAsyncIteration
            index, event = await self._next()
        if isinstance(event, Failure):
            self._open.discard(index)
            self.cancel()
            raise event.error
        self._count(index, event)
        return index, event

    async def _next(self) -> tuple[int, Event]:
        while not self._events:
            if self._late:
                self.cancel()
                text = f"The request took longer than {self._seconds:g} seconds (--time-limit)."
                raise ApiError(504, text, code="time_limit")
            if self.before_wait is not None:
                await self.before_wait()
                if self._events or self._late:
                    continue
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._events.popleft()

    def _expire(self) -> None:
        self._late = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _put(self, index: int, event: Event) -> None:
        self._events.append((index, event))
        self._wake()

    def _receiver(self, index: int) -> OnEvent:
        put = self._delivery.to(lambda event: self._put(index, event))

        def tell(event: Event) -> None:  # in the scheduler's thread
            full = len(self._events) >= MOST_EVENTS
            if full:
                event = Failure(ApiError(503, f"{MOST_EVENTS} tokens were left unread."))
            put(event)
            if full:
                raise BufferError("a client does not read")  # which ends the request

        return tell

    def _close(self, index: int) -> None:
        self._open.discard(index)
        if not self._open:
            self._deadline.cancel()

    def _count(self, index: int, event: PromptProgress | GeneratedToken) -> None:
        usage = self.usage[index]
        if isinstance(event, PromptProgress):
            usage.cached = event.cached
            return
        usage.generated += 1
        now, last = time.perf_counter(), self._last[index]
        if last is None:
            self._metrics.first_token(now - self._began, usage.prompt, usage.cached)
        else:
            self._metrics.next_token(now - last)
        self._last[index] = now
        if event.finish_reason is not None:
            self._close(index)
            self._metrics.ended(event.finish_reason)
