"""Holds what `glm-fused plan` predicts against what this machine takes.

    python bench/bench_plan.py                       # the bundled model, and true shapes
    python bench/bench_plan.py --models slice --repeats 5 --json

One process of two threads, and two of one thread each that share the model's rows over MLX's ring
on loopback, decode as bench_shards.py has them. Before and after, memory and link are measured as
`glm-fused doctor --hosts` does, each process beside the other; the single process is given the
plain reads of two threads. It prints the ms a token that the plan gives from the best, those
measured, the first as a part of the second, and of both what is spent in gathers. A plan is the
least that a token takes: it knows reads of weights and cache, and gathers, but no kernels, graphs
and launches. The bundled model's weights fit a cache, so that memory is none of its limits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import glm52_slice
from bench_decode import Worker
from bench_shards import SCRIPT, SLICE, Shared, measure
from common import report

import glm_fused
from glm_fused.checkpoint.folder import Checkpoint
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.measuring.cluster import Link, Machine, plan
from glm_fused.measuring.fit import memory_rate
from glm_fused.memory import machine_bytes

PROCESSES = 2
DOCTOR = ["-m", "glm_fused", "doctor", "--threads", "1", "--json"]
COLUMNS = {
    "model": "",
    "processes": "d",
    "planned ms": ".3f",
    "measured ms": ".3f",
    "planned/measured": ".2f",
    "planned in gathers": ".3f",
    "measured in gathers": ".3f",
    "read GB/s": ".1f",
    "link µs": ".0f",
    "link GB/s": ".2f",
}


class Measured:
    """Memory and link of this machine, at the best of several looks at them."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._alone: list[float] = []
        self._found: list[dict[str, Any]] = []

    def look(self) -> None:
        self._alone.append(memory_rate())
        hosts = ",".join(["127.0.0.1"] * PROCESSES)
        command = [sys.executable, *DOCTOR, "--hosts", hosts, "--model", self._model]
        done = subprocess.run(command, capture_output=True, text=True)
        self._found.append(json.loads(done.stdout))

    def link(self) -> Link:
        links = [found["link"] for found in self._found]
        return Link(min(each["latency"] for each in links), max(each["rate"] for each in links))

    def machines(self, processes: int) -> list[Machine]:
        if processes == 1:
            return [Machine(machine_bytes(), round(max(self._alone)))]
        rates = [min(rank["read_gb_per_s"] for rank in found["ranks"]) for found in self._found]
        return [Machine(machine_bytes() // processes, round(1e9 * max(rates)))] * processes


def compare(name: str, model: Path, folder: Path, options: argparse.Namespace) -> list[Any]:
    """A row for the single process, and one for those that share the model."""
    arguments = "--model", str(model), "--prompt", str(options.prompt)
    measured = Measured(str(model))
    measured.look()
    one, shared = Worker(sys.executable, SCRIPT, *arguments), Shared(PROCESSES, folder, *arguments)
    rows = measure(one, shared, options.tokens, options.repeats)
    shared.close()
    one.close()
    measured.look()
    context = options.prompt + options.tokens // 2
    return [_row(name, row, model, measured, context) for row in rows]


def _row(
    name: str, row: dict[str, Any], model: Path, measured: Measured, context: int
) -> dict[str, Any]:
    machines, link = measured.machines(row["processes"]), measured.link()
    found = plan(Checkpoint.open(model), machines, link, context, "auto")
    shared = (
        {}
        if len(machines) == 1
        else {
            "planned in gathers": found["gathers"]["ms"],
            "measured in gathers": row["ms in gathers"],
            "link µs": 1e6 * link.latency,
            "link GB/s": link.rate / 1e9,
        }
    )
    return {
        "model": name,
        "processes": row["processes"],
        "planned ms": found["ms_per_token"],
        "measured ms": row["ms"],
        "planned/measured": found["ms_per_token"] / row["ms"],
        "read GB/s": machines[0].rate / 1e9,
    } | shared


def parse() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--models", nargs="+", choices=["demo", "slice"], default=["demo", "slice"])
    add("--repeats", type=int, default=3, help="timed bursts; medians are printed")
    add("--tokens", type=int, default=32, help="of a burst")
    add("--prompt", type=int, default=86, help="tokens before a burst")
    add("--json", action="store_true", help="print one JSON document")
    return parser.parse_args()


def main() -> None:
    options, rows = parse(), []
    glm_fused.set_num_threads(PROCESSES)
    with TemporaryDirectory() as name:
        folder = Path(name)
        if "slice" in options.models:
            glm52_slice.write(SLICE, "affine4", folder)
        for which in options.models:
            model = folder if which == "slice" else bundled_folder()
            rows += compare(which, model, folder, options)
    report(rows, COLUMNS, options.json)


if __name__ == "__main__":
    main()
