"""``glm-fused selftest``: check every kernel, measure, make a report."""

from __future__ import annotations

import argparse

from . import arguments
from .output import print_json
from .progress import steps

HELP = "check every kernel, measure, make a report"
BACKENDS = ("cpu", "metal", "metal-sim", "all-available")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = f"{', '.join(BACKENDS)} (default: all-available)"
    add("--backend", choices=BACKENDS, default="all-available", metavar="NAME", help=text)
    add("--quick", action="store_true", help="a part of the cases, under half a minute")
    add("--no-bench", dest="bench", action="store_false", help="do not measure speed")
    text = "write the report to FILE; - prints it instead of a summary"
    add("--json", type=arguments.path, metavar="FILE", help=text)
    arguments.add_threads(parser)


def run(options: argparse.Namespace) -> int:
    from .. import set_num_threads
    from ..selftest import report

    target = None if options.json in (None, "-") else arguments.new_file(options.json)
    if options.threads is not None:
        set_num_threads(options.threads)
    with steps() as step:
        result = report.examine(
            options.backend, quick=options.quick, bench=options.bench, step=step
        )
    if options.json == "-":
        print_json(result)
    else:
        print(report.format_report(result))
    if target is not None:
        report.write(result, target)
        print(f"report written to {target}")
    return 0 if result["ok"] else 1
