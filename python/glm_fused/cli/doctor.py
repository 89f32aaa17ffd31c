"""``glm-fused doctor``: check the installation and this machine."""

from __future__ import annotations

import argparse

from . import arguments
from .output import print_json

HELP = "check the installation and this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_threads(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..selftest import doctor

    result = doctor.examine(options.threads)
    if options.json:
        print_json(result)
    else:
        print(doctor.format_result(result))
    return 0 if result["ok"] else 1
