"""The self-test's one document, as JSON and as text."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import machine
from .backends import chosen
from .cases import cases
from .machine import without_paths
from .microbench import run_benchmarks
from .run import run_backend

SCHEMA = 1
MAX_LINES = 12


def examine(
    choice: str, *, quick: bool, bench: bool, step: Callable[[str], None]
) -> dict[str, Any]:
    """Run the self-test; `step` is called with the name of each part that begins.

    Returns:
        The report: ``ok`` and everything it rests on, JSON-ready, without paths and names.

    Raises:
        ValueError: the backend of `choice` is not usable here.
    """
    backends, absent = chosen(choice)
    made = cases(quick)
    results = [run_backend(backend, made, step) for backend in backends]
    timed = [b for b in backends if b.name != "metal-sim"]
    return head() | {
        "ok": not any(r["failed"] for r in results),
        "quick": quick,
        "backends": results,
        "not_run": {name: without_paths(why) for name, why in absent.items()},
        "benchmarks": run_benchmarks(timed, quick, step) if bench and timed else None,
    }


def head() -> dict[str, Any]:
    """What every report begins with: when, and on what machine with which versions."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "environment": machine.environment(),
    }


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report in one step: it is written under another name and then renamed."""
    text = to_json(report) + "\n"
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def to_json(report: dict[str, Any]) -> str:
    """The report as JSON."""
    return json.dumps(report, indent=1, allow_nan=False)


def format_report(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [f"machine   {_machine(report['machine'])}"]
    lines.append("versions  " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    lines += [f"          {k}={v}" for k, v in report["environment"].items()]
    lines += [f"not run   {name}: {why}" for name, why in report["not_run"].items()]
    lines.append("")
    for backend in report["backends"]:
        lines += _backend(backend)
    if report["benchmarks"]:
        lines += ["", *_benchmarks(report["benchmarks"])]
    lines += ["", f"self-test {'passed' if report['ok'] else 'FAILED'}"]
    return "\n".join(lines)


def _machine(m: dict[str, Any]) -> str:
    gpu = f", {m['gpu_cores']} GPU cores" if m["gpu_cores"] else ""
    memory = f"{m['memory_bytes'] / 2**30:.0f} GiB"
    cpu = f"{m['cpu_cores']} CPU cores ({m['cpu_kernels']}, {m['threads']} threads)"
    return f"{m['chip']}, {cpu}{gpu}, {memory}, {m['os']}, Python {m['python']}"


def _backend(b: dict[str, Any]) -> list[str]:
    requested = {None: "", True: ", contraction on", False: ", contraction off"}
    mode = requested[b["contraction_requested"]] if b["backend"] == "metal-sim" else ""
    passed = b["cases"] - b["failed"]
    line = f"{b['backend'] + mode}: {passed} of {b['cases']} cases passed"
    if b["contraction_requested"] is None:
        line += f"; contraction found: {b['contraction_found']}"
    if b["max_ulps_from_cpu"] is not None:
        line += f"; at most {b['max_ulps_from_cpu']:.3g} ulps from the CPU"
    lines = [line]
    if compiled := [s for s in b["shaders"] if s["compile_seconds"] is not None]:
        total = sum(s["compile_seconds"] for s in compiled)
        slowest = max(compiled, key=lambda s: float(s["compile_seconds"]))
        lines.append(
            f"  shaders compiled in {total:.1f} s, the slowest in"
            f" {slowest['compile_seconds']:.2f} s ({slowest['case']})"
        )
    failed = [f"  FAILED  {_failure(r)}" for r in b["results"] if r["failures"]]
    if len(failed) > MAX_LINES:
        failed[MAX_LINES:] = [f"  and {len(failed) - MAX_LINES} more, all in the JSON report"]
    return lines + failed


def _failure(result: dict[str, Any]) -> str:
    """One line of text with the case, what is wrong with it, and where."""
    text = f"{result['case']}: {' and '.join(result['failures'])}"
    if error := result["error"]:
        return f"{text}: {' '.join(error.split())[:300]}"
    if d := result["difference"]:
        if "shapes" in d:
            return f"{text}; {d['shapes']} are the shapes here and of {result['against']}"
        text += f"; {d['count']} of {d['of']} values differ from {result['against']}, first at"
        text += f" {d['index']} of output {d['output']}: {d['bits'][0]} and {d['bits'][1]}"
    return text


def _benchmarks(benchmarks: dict[str, Any]) -> list[str]:
    lines = [
        "routed experts of a GLM layer (6144/2048, top-8, one token); read: the memory bandwidth",
        f"{'backend':8}{'format':>9}{'us':>9}{'GB/s':>9}{'read GB/s':>11}{'fraction':>10}"
        f"{'x stock MLX':>13}",
    ]
    for row in benchmarks["rows"]:
        head = f"{row['backend']:8}{row['format']:>9}"
        if "error" in row:
            lines.append(f"{head}  {' '.join(row['error'].split())}")
            continue
        stock = row["times_faster_than_stock"]
        lines.append(
            f"{head}{row['us']:>9.0f}{row['gb_per_s']:>9.1f}{row['read_gb_per_s']:>11.1f}"
            f"{row['fraction']:>10.2f}{'-' if stock is None else f'{stock:.2f}':>13}"
        )
    if benchmarks["skipped"]:
        lines.append(f"no time left for: {', '.join(benchmarks['skipped'])}")
    return lines
