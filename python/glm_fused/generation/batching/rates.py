"""How fast something goes, of late."""

from __future__ import annotations

import time
from collections import deque

WINDOW = 10.0  # seconds
_GRAIN = 0.1  # seconds, of which counts are kept as one


class Rate:
    """Counts, and counts per second in the last `WINDOW` seconds; read it from any thread."""

    def __init__(self) -> None:
        self.total = 0
        self._recent = deque[tuple[float, int]]()  # times, and totals before them

    def add(self, count: int) -> None:
        now = time.monotonic()
        if not self._recent or now - self._recent[-1][0] > _GRAIN:
            self._recent.append((now, self.total))
        while self._recent[0][0] < now - WINDOW:
            self._recent.popleft()
        self.total += count

    def of_late(self) -> float:
        """Counts per second in the last seconds; 0 where there were none."""
        now = time.monotonic()
        for began, before in list(self._recent):
            if began >= now - WINDOW:
                return (self.total - before) / max(now - began, 1.0)
        return 0.0
