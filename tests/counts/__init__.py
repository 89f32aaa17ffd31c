"""What kernels do, counted: numbers that no clock and no other work on the machine can change.

`cpu.json` has the instructions of the hot ops on the CPU for each instruction set, `metal.json` the
launches of a layer's stages with the bytes that they read and write. `tests/test_counts.py`
compares them with what the build does. After a change that is meant to change them:

    python -m tests.counts            # says what differs
    python -m tests.counts --record   # writes both files
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import cpu, metal

FOLDER = Path(__file__).parent
# Instructions may differ by so much, up or down: where the compiler is the one that built what was
# recorded, and with another, whose counts tell of large changes alone.
TOLERANCE, OTHER_COMPILER = 0.02, 0.25


def tolerance(recorded: Mapping[str, Any]) -> float:
    """The share by which counts of this build may differ from what ``cpu.json`` holds."""
    return TOLERANCE if recorded["compiler"] == cpu.compiler() else OTHER_COMPILER


def count_instructions(counter: Path) -> dict[str, dict[str, int]]:
    """The counts of every instruction set that this processor has."""
    sets = cpu.sets()
    with ThreadPoolExecutor() as pool:
        counts = pool.map(lambda kernels: cpu.count(counter, kernels), sets)
        return dict(zip(sets, counts, strict=True))


def instruction_drift(
    recorded: Mapping[str, int], found: Mapping[str, int], allowed: float
) -> list[str]:
    """A line for each op that is in one of the two alone, or whose counts differ too much."""
    lines = []
    for op in recorded.keys() | found.keys():
        before, now = recorded.get(op), found.get(op)
        if before is None or now is None:
            lines.append(f"{op}: {before} recorded, {now} counted")
        elif abs(now - before) > allowed * before:
            lines.append(f"{op}: {before} recorded, {now} counted ({now / before - 1:+.1%})")
    return sorted(lines)


def launch_drift(
    recorded: Mapping[str, list[dict[str, Any]]], found: Mapping[str, list[dict[str, Any]]]
) -> list[str]:
    """A line for each launch, of any stage, that is not exactly what was recorded."""
    lines = []
    for stage in sorted(recorded.keys() | found.keys()):
        before, now = recorded.get(stage, []), found.get(stage, [])
        if [launch["launch"] for launch in before] != [launch["launch"] for launch in now]:
            names = [[launch["launch"] for launch in launches] for launches in (before, now)]
            lines.append(f"{stage}: launches {names[0]} recorded, {names[1]} counted")
            continue
        for old, new in zip(before, now, strict=True):
            lines += [
                f"{stage}, {old['launch']}: {key} {old[key]} recorded, {new[key]} counted"
                for key in old
                if old[key] != new[key]
            ]
    return lines


def read(name: str) -> dict[str, Any]:
    """What was recorded: ``cpu`` or ``metal``."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def write(name: str, document: Mapping[str, Any]) -> None:
    """Record ``cpu`` or ``metal``; a launch takes one line."""
    text = json.dumps(document, indent=1)
    if name == "metal":
        stages = (
            f" {json.dumps(stage)}: [\n"
            + ",\n".join(f"  {json.dumps(launch)}" for launch in launches)
            + "\n ]"
            for stage, launches in document.items()
        )
        text = "{\n" + ",\n".join(stages) + "\n}"
    (FOLDER / f"{name}.json").write_text(text + "\n")


__all__ = ["cpu", "metal"]
