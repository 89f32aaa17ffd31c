"""What goes on now: the requests that are generated for, and the tokens of the last minutes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..generation.batching.requests import (
    Event,
    Failure,
    GenerationRequest,
    PromptProgress,
    Ticket,
)
from .delivery import Receive

Submit = Callable[[GenerationRequest, Receive], Ticket]
SECONDS = 120  # of the past that `history` tells of
_PER_SECOND = 4  # slices of time whose tokens are counted together
_RECENT = 2 * _PER_SECOND  # slices that "now" is taken over


class _Tokens:
    """Counts tokens by slices of time, and forgets those of more than ``slices`` ago."""

    def __init__(self, slices: int):
        self._slices = deque[list[int]]()  # number of the slice, tokens in it
        self._kept = slices

    def add(self, count: int, now: float) -> None:
        number = int(now * _PER_SECOND)
        if self._slices and self._slices[-1][0] == number:
            self._slices[-1][1] += count
            return
        self._slices.append([number, count])
        while self._slices[0][0] < number - self._kept:
            self._slices.popleft()

    def per_second(self, now: float, since: float) -> float:
        """How many a second there were of late, where they began at ``since``."""
        number = int(now * _PER_SECOND) - _RECENT
        start = max(since, number / _PER_SECOND)
        count = sum(count for each, count in self._slices if each >= number)
        return count / max(now - start, 1 / _PER_SECOND)

    def history(self, now: float) -> list[int]:
        """How many there were in each of the last seconds, the newest last."""
        end, found = int(now * _PER_SECOND), [0] * SECONDS
        for number, count in self._slices:
            ago = (end - 1 - number) // _PER_SECOND
            if 0 <= ago < SECONDS:  # not in the slice that is not over
                found[SECONDS - 1 - ago] += count
        return found


class _Row:
    """A request, and what has been done for it so far."""

    def __init__(self, number: int, prompt: int):
        self.number, self.prompt, self.begun = number, prompt, False
        self.done = self.cached = self.tokens = 0
        self.first = 0.0
        self._recent = _Tokens(_RECENT)

    def note(self, event: PromptProgress) -> None:
        self.begun, self.done, self.cached = True, event.done, event.cached

    def count(self, tokens: int, now: float) -> None:
        self.begun, self.done = True, self.prompt
        self.first = self.first or now
        self.tokens += tokens
        self._recent.add(tokens, now)

    def per_second(self, now: float) -> float:
        return self._recent.per_second(now, self.first) if self.tokens else 0.0

    def describe(self, now: float) -> dict[str, Any]:
        return {
            "id": self.number,
            "phase": "generation" if self.tokens else "prompt",
            "prompt_done": self.done,
            "prompt_total": self.prompt,
            "cached": self.cached,
            "tokens": self.tokens,
            "tokens_per_second": self.per_second(now),
        }


class Activity:
    """Hands requests on, and keeps count of what becomes of them; it belongs to the event loop.

    Args:
        submit: hands one to the scheduler, and what it tells to an event loop.
        clock: seconds, from any time on.
    """

    def __init__(self, submit: Submit, clock: Callable[[], float] = time.monotonic):
        self._submit, self._clock = submit, clock
        self._rows, self._number = dict[int, _Row](), 0
        self._tokens = _Tokens((SECONDS + 1) * _PER_SECOND)
        self._totals = dict.fromkeys(("requests", "prompt", "cached", "generated"), 0)

    def submit(self, request: GenerationRequest, receive: Receive) -> Ticket:
        """Hand a request on; what that raises passes through."""
        self._number += 1
        row = self._rows[self._number] = _Row(self._number, len(request.tokens))

        def noted(events: list[Event]) -> None:
            self._note(row, events)
            receive(events)

        try:
            return _Ticket(self._submit(request, noted), lambda: self._forget(row))
        except BaseException:
            self._forget(row)
            raise

    def describe(self) -> dict[str, Any]:
        """The requests that run, and how many tokens there are a second, JSON-ready.

        ``active`` has a dictionary for each that the scheduler has begun, ``history`` the tokens
        of each of the last `SECONDS` seconds, the newest last.
        """
        now = self._clock()
        begun = [row for row in self._rows.values() if row.begun]
        return {
            "active": [row.describe(now) for row in begun],
            "tokens_per_second": sum(row.per_second(now) for row in begun),
            "history": self._tokens.history(now),
            "totals": dict(self._totals),
        }

    def _note(self, row: _Row, events: Sequence[Event]) -> None:
        tokens, ended = 0, False
        for event in events:
            if isinstance(event, PromptProgress):
                row.note(event)
            elif isinstance(event, Failure):
                ended = True
            else:
                tokens += 1
                ended = event.finish_reason is not None
        if tokens:
            self._count(row, tokens)
        if ended:
            self._rows.pop(row.number, None)

    def _count(self, row: _Row, tokens: int) -> None:
        now, first = self._clock(), not row.tokens
        row.count(tokens, now)
        self._tokens.add(tokens, now)
        self._totals["generated"] += tokens
        if first:
            self._count_prompt(row)

    def _count_prompt(self, row: _Row) -> None:
        for name, count in (("requests", 1), ("prompt", row.prompt), ("cached", row.cached)):
            self._totals[name] += count

    def _forget(self, row: _Row) -> None:
        self._rows.pop(row.number, None)


class _Ticket:
    """A ticket that tells when it is cancelled."""

    def __init__(self, ticket: Ticket, cancelled: Callable[[], None]):
        self._ticket, self._cancelled = ticket, cancelled

    def cancel(self) -> None:
        """End the request where it is."""
        self._ticket.cancel()
        self._cancelled()
