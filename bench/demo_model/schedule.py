"""The run in time: when it and its phases end, how the learning rate follows, what is logged."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field
from typing import Any


class Logger:
    """Prints lines with the time since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self.start

    def __call__(self, text: str) -> None:
        """Print one line."""
        print(f"[{self.seconds / 60:6.2f}m] {text}", flush=True)


class Average:
    """An exponential moving average; ``new`` is the weight of the newest value."""

    def __init__(self, new: float) -> None:
        self.new = new
        self.value: Any = None

    def add(self, value: Any) -> None:
        """Take in a number or a tensor."""
        old, new = self.value, self.new
        self.value = value if old is None else (1 - new) * old + new * value


class Speed:
    """Tokens per second since it was last asked for."""

    def __init__(self, seen: int) -> None:
        self.mark = time.monotonic(), seen

    def since_last(self, seen: int) -> float:
        """The speed at which ``seen`` tokens were reached."""
        (before, had), now = self.mark, time.monotonic()
        self.mark = now, seen
        return (seen - had) / (now - before)


def parse_deadline(text: str) -> float:
    """Seconds from now until ``HH:MM`` today (or tomorrow), or a plain number of minutes."""
    if ":" not in text:
        return float(text) * 60
    hour, minute = map(int, text.split(":"))
    now = datetime.datetime.now()
    then = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    if then <= now:
        then += datetime.timedelta(days=1)
    return (then - now).total_seconds()


@dataclass
class Clock:
    """Tells how much of the run is over. A resumed run keeps its first start."""

    seconds: float
    start: float = field(default_factory=time.time)

    @property
    def progress(self) -> float:
        """The fraction of the run used so far."""
        return (time.time() - self.start) / self.seconds

    def resume(self, start: float) -> None:
        """Count from the ``start`` of an earlier process; the end stays where it is."""
        self.seconds += time.time() - start
        self.start = start


@dataclass
class Plan:
    """Where the phases end, as fractions of the run, and the learning-rate shape."""

    long_context: float = 0.55
    dense: float = 0.74
    warm_up: float = 0.82
    sparse: float = 0.97
    decay_from: float = 0.35
    final: float = 0.02

    def rate(self, progress: float, step: int) -> float:
        """The learning rate's factor: it warms up, stays constant, then falls to ``final``."""
        span = (progress - self.decay_from) / (self.sparse - self.decay_from)
        decay = 1.0 - (1.0 - self.final) * min(max(span, 0.0), 1.0)
        return min(1.0, (step + 1) / 40) * decay
