"""Times one GLM layer's routed experts (6144 / 2048, top-8, one token, bf16), per format."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import mlx.core as mx

from ..formats.weights import FORMATS
from .backends import Backend
from .benchmark import BENCHED, RoutedExperts, read_bandwidth, seconds
from .machine import without_paths

QUICK = ("affine4", "mxfp4", "bf16")
YARDSTICK_BYTES = 512 << 20
CALLS = 8  # evaluated together, as successive layers are


def run_benchmarks(
    backends: Sequence[Backend], quick: bool, step: Callable[[str], None]
) -> dict[str, Any]:
    """Measure medians per backend and format, JSON-ready; formats left out for time are named."""
    limit = 10.0 if quick else 55.0
    deadline = time.perf_counter() + limit
    yardstick = mx.zeros((YARDSTICK_BYTES // 4,), mx.uint32)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    slowest = 0.0
    for name in QUICK if quick else dict.fromkeys((*QUICK, *BENCHED)):
        start = time.perf_counter()
        if start + slowest > deadline:
            skipped.append(name)
            continue
        step(f"benchmark: {name}")
        with mx.stream(mx.cpu):
            mx.eval(yardstick)
            layer = RoutedExperts(FORMATS[name])
        for backend in backends:
            with backend.active():
                rows.append({"backend": backend.name, "format": name} | _row(layer, yardstick))
        slowest = max(slowest, time.perf_counter() - start)
    return {"seconds_allowed": limit, "rows": rows, "skipped": skipped}


def _row(layer: RoutedExperts, yardstick: mx.array) -> dict[str, Any]:
    try:
        return _measure(layer, yardstick)
    except Exception as error:  # where one format's shader fails, the others are still measured
        return {"error": without_paths(str(error).strip() or type(error).__name__)[:400]}


def _measure(layer: RoutedExperts, yardstick: mx.array) -> dict[str, Any]:
    mx.eval(layer.fused(*layer.route()))
    took, fractions, bandwidths = [], [], []
    size = layer.top_k * layer.expert_bytes
    for _ in range(5):
        bandwidths.append(read_bandwidth(yardstick))
        took.append(_seconds_each(layer, layer.fused, CALLS))
        fractions.append(size / took[-1] / 1e9 / bandwidths[-1])
    row = {
        "us": median(took) * 1e6,
        "megabytes": size / 1e6,
        "gb_per_s": size / median(took) / 1e9,
        "read_gb_per_s": median(bandwidths),
        "fraction": median(fractions),
        "times_faster_than_stock": None,
    }
    # On the CPU stock MLX is too slow for more than one expert, and takes only fp32 dense weights.
    on_gpu = mx.default_device() == mx.gpu
    if on_gpu or layer.gate.format.mode != "dense":
        top_k, calls, repeats = (layer.top_k, CALLS, 5) if on_gpu else (1, 1, 1)
        stock = _median_each(layer, layer.stock, calls, repeats, top_k)
        row["times_faster_than_stock"] = stock / _median_each(layer, layer.fused, CALLS, 3, top_k)
    return row


def _median_each(
    layer: RoutedExperts, op: Callable[..., mx.array], calls: int, repeats: int, top_k: int
) -> float:
    if repeats > 1:
        mx.eval(op(*layer.route(top_k)))
    return median(_seconds_each(layer, op, calls, top_k) for _ in range(repeats))


def _seconds_each(
    layer: RoutedExperts, op: Callable[..., mx.array], calls: int, top_k: int | None = None
) -> float:
    routes = [layer.route(top_k) for _ in range(calls)]
    return seconds(lambda: [op(*route) for route in routes]) / calls
