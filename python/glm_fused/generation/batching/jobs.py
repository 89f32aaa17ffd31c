"""A request on its way through the scheduler, and whom to tell of it."""

from __future__ import annotations

import threading

from .requests import Event, Failure, GeneratedToken, GenerationRequest, OnEvent


class Job:
    """A request and who listens; the `Ticket` of whoever asked.

    Attributes:
        request: the request, with ``max_tokens`` given.
        over: whether no event follows.
    """

    def __init__(self, request: GenerationRequest, on_event: OnEvent):
        self.request, self.over = request, False
        self._on_event, self._lock = on_event, threading.RLock()

    def cancel(self) -> None:
        """End it where it is, and give its memory back; no event follows once this is done."""
        with self._lock:
            self.over = True

    def tell(self, event: Event) -> None:
        """Pass an event on, unless it is over; the last event makes it so.

        Raises whatever the listener does.
        """
        with self._lock:
            if not self.over:
                if isinstance(event, GeneratedToken):
                    self.over = event.finish_reason is not None
                else:
                    self.over = isinstance(event, Failure)
                self._on_event(event)

    def fail(self, error: Exception) -> bool:
        """End it with an error, whatever the listener says; returns whether it was not over."""
        with self._lock:
            if self.over:
                return False
            try:
                self.tell(Failure(error))
            except Exception:  # a listener that fails again: there is nobody else to tell
                self.over = True
            return True
