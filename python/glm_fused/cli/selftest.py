"""``glm-fused selftest``: check every kernel, measure, make a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from . import arguments
from .output import print_json
from .progress import steps

HELP = "check every kernel, measure, make a report"
BACKENDS = ("cpu", "metal", "metal-sim", "all-available")
SIZES = ("glm-5.2", "small")
PARTS = ("bandwidth", "stages", "layers", "token", "prompts", "streaming", "last_slot", "sweep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = f"{', '.join(BACKENDS)} (default: all-available)"
    add("--backend", choices=BACKENDS, default="all-available", metavar="NAME", help=text)
    add("--quick", action="store_true", help="a part of the cases, under half a minute")
    add("--no-bench", dest="bench", action="store_false", help="do not measure speed")
    text = "measure instead of checking: layers of GLM-5.2's shapes, some minutes, or small ones"
    add("--measure", choices=SIZES, metavar="SIZE", help=f"{text} ({' or '.join(SIZES)})")
    text = f"with --measure: some of {', '.join(PARTS)} (default: all)"
    add("--parts", type=_parts, default=PARTS, metavar="PART,…", help=text)
    text = "write the report to FILE; - prints it instead of a summary"
    add("--json", type=arguments.path, metavar="FILE", help=text)
    arguments.add_threads(parser)


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"no part is named {unknown[0]!r}")
    return parts


def run(options: argparse.Namespace) -> int:
    from .. import set_num_threads
    from ..selftest import report

    target = None if options.json in (None, "-") else arguments.new_file(options.json)
    if options.threads is not None:
        set_num_threads(options.threads)
    with steps() as step:
        if options.measure is not None:
            result, text = _measure(options, step)
        else:
            result = report.examine(
                options.backend, quick=options.quick, bench=options.bench, step=step
            )
            text = report.format_report(result)
    if options.json == "-":
        print_json(result)
    else:
        print(text)
    if target is not None:
        report.write(result, target)
        print(f"report written to {target}")
    return 0 if result["ok"] else 1


def _measure(
    options: argparse.Namespace, step: Callable[[str], None]
) -> tuple[dict[str, Any], str]:
    """The report of measurements, and as text; a GPU's where there is one, else the CPU's."""
    from ..measuring.measure import measure
    from ..measuring.report import format_all
    from ..selftest import report
    from ..selftest.backends import chosen

    backends, _ = chosen(options.backend)
    if options.backend == "all-available":
        backends = [b for b in backends if b.name == "metal"] or backends[:1]
    head = report.head()
    memory = head["machine"]["memory_bytes"]
    found = [measure(b, options.measure, memory, options.parts, step) for b in backends[:1]]
    return head | {"ok": True, "measured": found}, format_all(found)
