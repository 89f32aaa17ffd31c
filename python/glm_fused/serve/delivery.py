"""Events on their way from the scheduler's thread to the event loop, those of a turn together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from ..generation.batching.requests import Event, OnEvent

Receive = Callable[[Event], None]
Put = tuple[Receive, Event]


class Delivery:
    """Hands events over to event loops, in one go for all that were told since the last time.

    To wake a loop costs more than what it does with an event, and each time the two threads have to
    take turns. So the scheduler calls `flush` once its turn is over.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[Put]] = {}

    def to(self, receive: Receive) -> OnEvent:
        """What takes events in the scheduler's thread, for ``receive`` to get them in this loop."""
        loop = asyncio.get_running_loop()

        def put(event: Event) -> None:
            self._waiting.setdefault(loop, []).append((receive, event))

        return put

    def flush(self) -> None:
        """Have the loops receive what was put; from the scheduler's thread."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        for loop, events in waiting.items():
            with contextlib.suppress(RuntimeError):  # it was closed, so nobody waits there
                loop.call_soon_threadsafe(_receive, events)


def _receive(events: Sequence[Put]) -> None:
    for receive, event in events:
        receive(event)
