"""``glm-fused selftest``: check every kernel, measure, make a report."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

from . import arguments
from .output import print_json

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
    with _steps() as step:
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


@contextlib.contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Give the block a function that shows on a terminal what is being done."""
    from tqdm import tqdm

    with tqdm(bar_format="{elapsed} {desc}", disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.set_description_str
