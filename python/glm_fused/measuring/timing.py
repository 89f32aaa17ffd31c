"""How long an evaluation takes, how many kernels it launches, and how much memory it needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx

from .. import _ext

REPEATS = 7
Build = Callable[[], Any]  # makes arrays, or a list of them, that are evaluated


def seconds(build: Build, repeats: int = REPEATS) -> float:
    """The median time of building and evaluating, once it has been done before."""
    return median(_samples(build, repeats))


def measured(build: Build, repeats: int = REPEATS) -> dict[str, Any]:
    """`seconds`, in microseconds, with the launches of one evaluation and its peak of memory.

    ``launches`` are those of this package's kernels, and None where it has none on a GPU;
    ``peak_bytes`` are beyond what is held before.
    """
    mx.eval(build())
    mx.synchronize()
    _ext.take_metal_launches()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(build())
    mx.synchronize()
    launches = _ext.take_metal_launches()
    peak = mx.get_peak_memory() - before
    return {
        "us": 1e6 * median(_samples(build, repeats)),
        "launches": launches or None,
        "peak_bytes": peak,
    }


def _samples(build: Build, repeats: int) -> list[float]:
    mx.eval(build())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(build())
        taken.append(time.perf_counter() - start)
    return taken
