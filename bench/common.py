"""Shared by the benchmarks: weights of a given format, timing, bandwidth, tables and JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import glm_fused
from glm_fused import _ext
from glm_fused.ops import Weight

# name: (mode, bits, group_size)
FORMATS = {
    "affine2": ("affine", 2, 64),
    "affine3": ("affine", 3, 64),
    "affine4": ("affine", 4, 64),
    "affine5": ("affine", 5, 64),
    "affine6": ("affine", 6, 64),
    "affine8": ("affine", 8, 64),
    "mxfp4": ("mxfp4", 4, 32),
    "mxfp8": ("mxfp8", 8, 32),
    "nvfp4": ("nvfp4", 4, 16),
    "bf16": ("dense", 0, 0),
}
DTYPES = {"bf16": mx.bfloat16, "fp16": mx.float16, "fp32": mx.float32}


def bits_per_weight(name: str) -> float:
    mode, bits, group = FORMATS[name]
    if mode == "dense":
        return 16
    return bits + (32 if mode == "affine" else 8) / group


def random_bytes(count: int, low: int = 0, high: int = 256) -> np.ndarray:
    """`count` random bytes; beyond 64 MB the same ones again, which no cache can tell."""
    rng = np.random.default_rng(0)
    return np.resize(rng.integers(low, high, min(count, 1 << 26), dtype=np.uint8), count)


def random_weight(name: str, shape: tuple[int, ...], seed: int = 0) -> Weight:
    """A weight [..., n, k] of random bits whose products stay in a sane range."""
    mode, bits, group = FORMATS[name]
    *lead, k = shape
    rows = int(np.prod(lead))
    rng = np.random.default_rng(seed)
    if mode == "dense":
        values = np.resize(rng.standard_normal(1 << 20, dtype=np.float32) / np.sqrt(k), rows * k)
        return Weight(mx.array(values).astype(mx.bfloat16).reshape(shape))
    packed = random_bytes(rows * k * bits // 8).view(np.uint32).reshape(*lead, k * bits // 32)
    if mode == "affine":
        step = 2.0 / (2**bits * np.sqrt(k))
        scale = np.resize(
            rng.uniform(0.5, 1.5, 1 << 16).astype(np.float32) * step, rows * k // group
        )
        scales = mx.array(scale).astype(mx.bfloat16).reshape(*lead, k // group)
        return Weight(mx.array(packed), scales, -scales * 2 ** (bits - 1), group, bits, mode)
    if mode == "mxfp8":  # no NaN codes
        packed = packed & np.uint32(0xBFBFBFBF)
    low, high = (40, 48) if mode == "nvfp4" else (117, 122)
    scale_bytes = random_bytes(rows * k // group, low, high)
    return Weight(
        mx.array(packed), mx.array(scale_bytes.reshape(*lead, k // group)), None, group, bits, mode
    )


def nbytes(w: Weight) -> int:
    return sum(a.nbytes for a in (w.weight, w.scales, w.biases) if a is not None)


def seconds(call: Callable[[], mx.array]) -> float:
    """Wall time of one evaluated call."""
    start = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - start


def read_bandwidth(a: mx.array) -> float:
    """GB/s of plain streaming reads of `a` with the kernels' own threads."""
    start = time.perf_counter()
    _ext.stream_read(a)
    return a.nbytes / (time.perf_counter() - start) / 1e9


def multiply_add_rate() -> float:
    """Multiply-adds per second, in registers, with the kernels' own threads."""
    start = time.perf_counter()
    count = _ext.multiply_adds(300_000)
    return count / (time.perf_counter() - start)


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "kernels": _ext.cpu_kernels(),
        "threads": glm_fused.num_threads(),
        "mlx": mx.__version__,
        "glm_fused": glm_fused.__version__,
    }


def parser(description: str, formats: Iterable[str] = FORMATS) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--formats", nargs="+", choices=list(formats), default=list(formats))
    made.add_argument("--dtype", choices=DTYPES, default="bf16", help="activations")
    made.add_argument("--repeats", type=int, default=9, help="timed repeats; medians are printed")
    made.add_argument("--threads", type=int, help="default: every processor")
    made.add_argument("--json", action="store_true", help="print one JSON document")
    return made


def report(rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool) -> None:
    """Print `rows` as a table whose `columns` map key to format, or as JSON."""
    if as_json:
        print(json.dumps({"machine": machine(), "rows": rows}, indent=1))
        return
    print("  ".join(f"{k}={v}" for k, v in machine().items()))
    cells = [
        ["-" if row.get(key) is None else format(row[key], spec) for key, spec in columns.items()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(list(columns), *cells, strict=True)]
    for line in [list(columns), *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
