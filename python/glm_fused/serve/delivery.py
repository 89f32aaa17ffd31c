"""Events on their way from the scheduler's thread to event loops, those of some time together."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable

from ..generation.batching.requests import Event, GeneratedToken, OnEvent

Receive = Callable[[list[Event]], None]
TOGETHER = 0.02  # seconds that a token waits at most for those that follow
_EARLY = 0.001  # seconds before a loop looks for itself, from which on nothing is left to that


class Delivery:
    """Hands events over to event loops, those of one text as one list.

    To wake a loop and to send what it was told costs as much as a small model's step, and takes the
    cores that the step needs. So a text's further tokens wait for others, up to `TOGETHER` after
    the last time that events were handed over, unless the scheduler's next turn may end later: of a
    model that takes longer for a step each is handed over at once. So is all else, such as a first
    token, progress or an end, with what waits.

    Args:
        clock: seconds, from any time on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._inboxes = dict[asyncio.AbstractEventLoop, _Inbox]()
        # All else belongs to the scheduler's thread.
        self._waiting, self._urgent = set[_Inbox](), False
        self._flushed = self._handed = -math.inf

    def to(self, receive: Receive) -> OnEvent:
        """What takes a text's events in the scheduler's thread, for ``receive`` in this loop."""
        loop = asyncio.get_running_loop()
        inbox, begun = self._inboxes.setdefault(loop, _Inbox(loop)), False

        def put(event: Event) -> None:
            nonlocal begun
            inbox.events.append((receive, event))
            self._waiting.add(inbox)
            if not isinstance(event, GeneratedToken):
                self._urgent = True
            elif not begun or event.finish_reason is not None:
                self._urgent = begun = True

        return put

    def flush(self) -> None:
        """A turn of the scheduler is over: hand over what is due; from the scheduler's thread."""
        now = self._clock()
        turn, self._flushed = now - self._flushed, now
        if self._waiting and (self._urgent or now + turn >= self._handed + TOGETHER - _EARLY):
            waiting, self._waiting = self._waiting, set()
            self._handed, self._urgent = now, False
            for inbox in waiting:
                try:
                    inbox.loop.call_soon_threadsafe(inbox.look)
                except RuntimeError:  # it was closed, so nobody waits there
                    inbox.events.clear()
                    self._inboxes.pop(inbox.loop, None)


class _Inbox:
    """Events on their way to one loop, which alone takes them.

    `TOGETHER` after it was woken, or has found some, it looks for more. So none waits longer,
    whatever the scheduler does meanwhile.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.events = loop, deque[tuple[Receive, Event]]()
        self._later: asyncio.TimerHandle | None = None

    def look(self, woken: bool = True) -> None:
        """Have receivers get what is here."""
        found = defaultdict[Receive, list[Event]](list)
        for _ in range(len(self.events)):
            receive, event = self.events.popleft()
            found[receive].append(event)
        if self._later is not None:
            self._later.cancel()
        again = woken or bool(found)
        self._later = self.loop.call_later(TOGETHER, self.look, False) if again else None
        for receive, events in found.items():
            receive(events)
