"""Hands pieces of work to workers, and counts how their cases end."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .harness import FAULTS, OUTCOMES, load_kind, setting

ROOT = Path(__file__).parents[2]
WORKERS = 2
PREPARATION = 300.0  # seconds, which allow for compilers and loaded machines
MOST_DEATHS = 25  # so many workers of one piece may die


@dataclass
class Tally:
    """What the cases of one kind came to."""

    kind: str
    counts: Counter = field(default_factory=Counter)
    failures: list = field(default_factory=list)  # (seed, outcome, detail)
    messages: Counter = field(default_factory=Counter)  # texts of clear errors, without numbers
    seconds: float = 0.0
    first: int | None = None
    last: int | None = None
    planted: str | None = None  # how the planted fault was caught; "" if it was not

    @property
    def cases(self):
        return sum(self.counts.values())

    def add(self, seed, outcome, detail):
        """Count one case; `seed` may be "prepare" or "exit"."""
        self.counts[outcome] += 1
        if outcome in FAULTS:
            self.failures.append((seed, outcome, detail))
        elif outcome == "clear error":
            self.messages[re.sub(r"\d+", "#", detail)] += 1
        if isinstance(seed, int):
            self.first = seed if self.first is None else min(self.first, seed)
            self.last = seed if self.last is None else max(self.last, seed)

    def merge(self, other):
        """Add another piece of the same kind."""
        self.counts += other.counts
        self.failures += other.failures
        self.messages += other.messages
        self.seconds += other.seconds
        ends = [s for s in (self.first, self.last, other.first, other.last) if s is not None]
        self.first, self.last = (min(ends), max(ends)) if ends else (None, None)
        self.planted = other.planted if self.planted is None else self.planted

    @property
    def ok(self):
        """Whether no case failed and a planted fault, if there was one, was caught."""
        return self.planted != "" and not any(self.counts[o] for o in FAULTS)


@dataclass
class Piece:
    """Work for one worker: seeds of one kind, then up to `planted` cases with the planted fault."""

    kind: str
    seeds: range
    seconds: float
    planted: int = 0


class Worker:
    """A process, the pipe it reports on, and what it printed."""

    def __init__(self, piece, seeds, seconds, folder):
        reading, writing = os.pipe()
        task = {
            "kind": piece.kind,
            "seeds": [seeds.start, seeds.stop, seeds.step],
            "seconds": seconds,
            "planted": piece.planted,
            "folder": str(folder),
            "pipe": writing,
        }
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, paths))
        environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        arguments = ["-X", "faulthandler", "-m", "tests.adversarial.worker", json.dumps(task)]
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            cwd=ROOT,
            env=environment,
            pass_fds=[writing],
        )
        os.close(writing)
        self.pipe, self.buffer = reading, b""

    def record(self, timeout):
        """The next record; None at the end. Raises TimeoutError."""
        end = time.monotonic() + timeout
        while b"\n" not in self.buffer:
            if not select.select([self.pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            data = os.read(self.pipe, 1 << 16)
            if not data:
                return None
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def stop(self):
        """End the process, which first prints where its threads are; returns what was printed."""
        for signal_number in (signal.SIGABRT, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(signal_number)
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    continue
        return self.printed()

    def printed(self):
        """The beginning and the end of what it printed."""
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        return text if len(text) < 3000 else f"{text[:1500]}\n...\n{text[-1500:]}"

    def how_it_died(self):
        """The signal's name or the exit code; None if it ended well."""
        code = self.process.wait(20)
        if code == 0:
            return None
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self):
        """Close what the process used."""
        os.close(self.pipe)
        self.log.close()


def run_piece(piece, stop_at=float("inf")):
    """Run a piece, with new workers in the place of those that die; returns its `Tally`."""
    tally, began = Tally(piece.kind), time.monotonic()
    end = min(began + piece.seconds, stop_at)
    seeds = piece.seeds
    for _ in range(MOST_DEATHS):
        folder = Path(tempfile.mkdtemp(prefix=f"adversarial-{piece.kind}-"))
        worker = Worker(piece, seeds, max(0.0, end - time.monotonic()), folder)
        try:
            seeds = _follow(worker, piece, seeds, tally)
        finally:
            worker.stop()
            worker.close()
            shutil.rmtree(folder, ignore_errors=True)
        if seeds is None:
            break
    if piece.planted and tally.planted is None:
        tally.planted = ""
    tally.seconds = time.monotonic() - began
    return tally


def _follow(worker, piece, seeds, tally):
    """Count a worker's cases until it ends; returns the seeds that are left, or None."""
    at, limit, planted, done = "prepare", PREPARATION, False, False
    while True:
        try:
            record = worker.record(limit)
            death = worker.how_it_died() if record is None else None
        except (TimeoutError, subprocess.TimeoutExpired):
            record, death = None, "hang"
        if record is None:
            break
        if "ready" in record:
            case_limit, limit, at = record["ready"], 60.0, "exit"
        elif "begin" in record:
            at, limit, planted = record["begin"], case_limit, "planted" in record
        elif "end" in record:
            _count(tally, record["end"], record["outcome"], record["detail"], planted)
            seeds = seeds if planted else range(record["end"] + seeds.step, seeds.stop, seeds.step)
            at, limit = "exit", 60.0
        else:
            done = True
    if death is None:
        return None
    outcome = "hang" if death == "hang" else "crash"
    _count(tally, at, outcome, f"{death}\n{worker.stop()}", planted and isinstance(at, int))
    if done or planted or not isinstance(at, int):
        return None
    return range(at + seeds.step, seeds.stop, seeds.step)


def _count(tally, seed, outcome, detail, planted):
    if not planted:
        tally.add(seed, outcome, detail)
    elif outcome in FAULTS and tally.planted is None:
        tally.planted = f"{outcome}, seed {seed}"


def split(kind, seeds, seconds, planted, pieces):
    """At least `pieces` pieces of the seeds, none with more cases than a worker takes."""
    count = max(pieces, -(-len(seeds) // setting(load_kind(kind), "PIECE")))
    count = max(1, min(count, len(seeds)))
    size = -(-len(seeds) // count)
    parts = [seeds[i : i + size] for i in range(0, len(seeds), size)] or [seeds]
    return [Piece(kind, s, seconds, planted if i == 0 else 0) for i, s in enumerate(parts)]


def run_all(plan, seconds=float("inf"), planted=0, total_seconds=float("inf")):
    """Run {kind: seeds}; returns {kind: Tally}.

    A piece ends after `seconds`, and all of them after about `total_seconds`; `planted` is how many
    cases the planted fault of a kind may take to be caught, 0 for no such fault.
    """
    seconds = min(seconds, 1e9)
    pieces = []
    for kind, seeds in plan.items():
        pieces += split(kind, seeds, seconds, planted, WORKERS if len(plan) == 1 else 1)
    stop_at = time.monotonic() + total_seconds
    tallies = {kind: Tally(kind) for kind in plan}
    with ThreadPoolExecutor(WORKERS) as pool:
        for tally in pool.map(lambda piece: run_piece(piece, stop_at), pieces):
            tallies[tally.kind].merge(tally)
    return tallies


def table(tallies):
    """A Markdown table with a row per kind."""
    lines = [
        "| kind of fault | cases | " + " | ".join(OUTCOMES) + " | seeds | seconds | planted |",
        "|---|" + "---:|" * (1 + len(OUTCOMES)) + "---|---:|---|",
    ]
    total = Counter()
    for tally in tallies.values():
        total += tally.counts
        seeds = "" if tally.first is None else f"{tally.first}:{tally.last + 1}"
        planted = {None: "not run", "": "NOT CAUGHT"}.get(tally.planted, tally.planted)
        counts = " | ".join(f"{tally.counts[o]:,}" for o in OUTCOMES)
        row = f"{tally.kind} | {tally.cases:,} | {counts} | {seeds} | {tally.seconds:.0f}"
        lines.append(f"| {row} | {planted} |")
    counts = " | ".join(f"{total[o]:,}" for o in OUTCOMES)
    lines.append(f"| **all** | {sum(total.values()):,} | {counts} | | | |")
    return "\n".join(lines)


def failures(tallies, most=12):
    """The failed cases, up to `most` of a kind, with the command that repeats each."""
    lines = []
    for tally in tallies.values():
        command = f"python -m tests.adversarial --kind {tally.kind} --seeds"
        for seed, outcome, detail in tally.failures[:most]:
            lines.append(f"{outcome}: {tally.kind}, seed {seed}: {detail}")
            if isinstance(seed, int):
                lines.append(f"    {command} {seed}:{seed + 1}")
        if len(tally.failures) > most:
            lines.append(f"{tally.kind}: {len(tally.failures) - most} more failed")
        if tally.planted == "":
            lines.append(f"{tally.kind}: the planted fault was not caught")
    return "\n".join(lines)
