"""``glm-fused inspect``: what a checkpoint is and what it costs."""

from __future__ import annotations

import argparse

from . import arguments
from .output import print_json

HELP = "say what a checkpoint is and what it costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=arguments.path, metavar="PATH", help=arguments.MODEL)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint.description import describe, format_description

    description = describe(options.path)
    if options.json:
        print_json(description)
    else:
        print(format_description(description))
    return 0
