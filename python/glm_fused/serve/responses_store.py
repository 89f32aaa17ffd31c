"""Responses that later requests can go on from, in memory, the oldest forgotten first."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .turn import Message


@dataclass(frozen=True)
class Stored:
    """A response as its API says it, and the conversation that it ends, without instructions."""

    response: dict[str, Any]
    messages: Sequence[Message]


class ResponseStore:
    """Keeps responses by their ids while all of them together have at most ``limit`` characters.

    Any thread may use it.
    """

    def __init__(self, limit: int = 64 << 20):
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, stored: Stored) -> None:
        """Keep a response, and forget those unused longest beyond the limit, it too if need be."""
        # Conversations share their messages; counting these each time stays on the safe side.
        size = len(json.dumps((stored.response, list(stored.messages))))
        with self._lock:
            self._drop(stored.response["id"])
            self._kept[stored.response["id"]] = stored, size
            self._size += size
            while self._size > self._limit:
                self._drop(next(iter(self._kept)))

    def get(self, response_id: str) -> Stored | None:
        """The response, or None if it was never kept or is forgotten."""
        with self._lock:
            if response_id not in self._kept:
                return None
            self._kept.move_to_end(response_id)
            return self._kept[response_id][0]

    def delete(self, response_id: str) -> bool:
        """Forget a response; whether it was there."""
        with self._lock:
            return self._drop(response_id)

    def _drop(self, response_id: str) -> bool:
        _, size = self._kept.pop(response_id, (None, 0))
        self._size -= size
        return size > 0
