"""What the benchmarks share: options, tables and JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import mlx.core as mx

import glm_fused
from glm_fused import _ext
from glm_fused.selftest.benchmark import BENCHED
from glm_fused.selftest.machine import chip

DTYPES = {"bf16": mx.bfloat16, "fp16": mx.float16, "fp32": mx.float32}


def multiply_add_rate() -> float:
    """The multiply-adds per second in registers, with the kernels' own threads.

    The best of a few tries: in one, a thread may have come late.
    """
    rates = []
    for _ in range(4):
        start = time.perf_counter()
        count = _ext.multiply_adds(300_000)
        rates.append(count / (time.perf_counter() - start))
    return max(rates)


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, Any]:
    """The parts of the machine and the versions that the numbers depend on."""
    return {
        "cpu": chip(),
        "kernels": _ext.cpu_kernels(),
        "threads": glm_fused.num_threads(),
        "mlx": version("mlx"),
        "glm_fused": glm_fused.__version__,
    }


def parser(
    description: str, formats: Iterable[str] = BENCHED, others: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `others` run where they are asked for."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--formats", nargs="+", choices=[*formats, *others], default=[*formats])
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
