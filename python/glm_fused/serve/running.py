"""Requests that a scheduler works on, as an asynchronous stream of what it tells."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from ..generation.batching.requests import (
    Event,
    Failure,
    GeneratedToken,
    GenerationRequest,
    PromptProgress,
    Ticket,
)
from .activity import Submit
from .errors import ApiError
from .metrics import Metrics

Tokens = list[GeneratedToken]
MOST_JOINED = 256  # tokens of one text that are given together
MOST_EVENTS = 65_536  # that a client has not read yet
_Found = PromptProgress | Tokens | Failure


@dataclass
class Usage:
    """Tokens of one request: the prompt's, those of it that were at hand, and generated ones."""

    prompt: int
    cached: int = 0
    generated: int = 0


class Running:
    """Requests that run at once, for one client.

    Iterating gives, until all end, a request's index with the progress of its prompt or with the
    tokens that are at hand. It belongs to the event loop that made it. `cancel` ends what still
    runs, and has to be called by whoever stops iterating early.

    Attributes:
        usage: the tokens of each request, without those that were given last.
        before_wait: is called, and waited for, where no event is at hand.

    Args:
        requests: what to generate.
        submit: hands one on, with what receives its events; what that raises passes through, with
            nothing left behind.
        seconds: how long all of it may take.
        metrics: is told of tokens and times.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        submit: Submit,
        seconds: float,
        metrics: Metrics,
    ):
        self.usage = [Usage(len(request.tokens)) for request in requests]
        self.before_wait: Callable[[], Awaitable[None]] | None = None
        self._loop, self._metrics = asyncio.get_running_loop(), metrics
        self._events, self._unread = deque[tuple[int, _Found]](), 0
        self._given: tuple[int, Tokens, float] | None = None  # and when
        self._waiter: asyncio.Future[None] | None = None
        self._seconds, self._late = seconds, False
        self._deadline = self._loop.call_later(seconds, self._expire)
        self._open = set(range(len(requests)))
        self._began = time.perf_counter()
        self._last: list[float | None] = [None] * len(requests)
        self._tickets: list[Ticket] = []
        try:
            for i, request in enumerate(requests):
                self._tickets.append(submit(request, partial(self._receive, i)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End what still runs; nothing where all has ended."""
        self._count()
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
            self._events += [(index, Failure(error)) for index in self._open]
            self._wake()

    def end(self, index: int, unused: int) -> None:
        """End one request where it is: its answer is complete.

        Of the tokens that were given last, all of this request, the last ``unused`` are no part of
        it.
        """
        self._count(unused)
        if index in self._open:
            self._tickets[index].cancel()
            self._close(index)
            self._metrics.ended("stop")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, PromptProgress | Tokens]:
        """What is next; raises ApiError where a request fails or takes too long."""
        self._count()
        index = -1
        while index not in self._open:  # events of a request that was ended may be on their way
            if not self._open:
                raise StopAsyncIteration
            index, found = await self._next()
        if isinstance(found, Failure):
            self._open.discard(index)
            self.cancel()
            raise found.error
        if isinstance(found, PromptProgress):
            self.usage[index].cached = found.cached
        else:
            self._given = index, found, time.perf_counter()
        return index, found

    async def _next(self) -> tuple[int, _Found]:
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
        index, found = self._events.popleft()
        if isinstance(found, list):
            self._unread -= len(found)
        return index, found

    def _expire(self) -> None:
        self._late = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _receive(self, index: int, events: Sequence[Event]) -> None:
        for event in events:
            if not isinstance(event, GeneratedToken):
                self._events.append((index, event))
                continue
            self._unread += 1
            at, last = self._events[-1] if self._events else (-1, None)
            if at == index and isinstance(last, list) and len(last) < MOST_JOINED:
                last.append(event)
            else:
                self._events.append((index, [event]))
        if self._unread > MOST_EVENTS:
            self.fail(ApiError(503, f"{MOST_EVENTS} tokens were left unread."))
        self._wake()

    def _close(self, index: int) -> None:
        self._open.discard(index)
        if not self._open:
            self._deadline.cancel()

    def _count(self, unused: int = 0) -> None:
        """Count the tokens that were given last, but for the last ``unused`` of them."""
        if self._given is None:
            return
        (index, tokens, now), self._given = self._given, None
        count, ended = len(tokens) - unused, tokens[-1].finish_reason if not unused else None
        usage, last, following = self.usage[index], self._last[index], count
        if last is None:
            self._metrics.first_token(now - self._began, usage.prompt, usage.cached)
            last, following = now, following - 1
        if following:
            self._metrics.next_tokens(following, now - last)
        self._last[index] = now
        usage.generated += count
        if ended is not None:
            self._close(index)
            self._metrics.ended(ended)
