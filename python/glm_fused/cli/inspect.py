"""``glm-fused inspect``: what a checkpoint is and what it costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import arguments
from .output import print_json

HELP = "say what a checkpoint is and what it costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=arguments.path, metavar="PATH", help=arguments.MODEL)
    help = "with the experts of this Flash-MoE sidecar"
    parser.add_argument("--sidecar", type=arguments.path, metavar="DIR", help=help)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint.description import describe_checkpoint, format_description
    from ..checkpoint.folder import Checkpoint
    from ..streaming.flashmoe import is_flashmoe, with_experts

    checkpoint = Checkpoint.open(options.path)
    if options.sidecar is not None:
        sidecar = Path(options.sidecar)
        if not is_flashmoe(sidecar):
            raise ValueError(f"[sidecar] {sidecar} holds no manifest of Flash-MoE's.")
        checkpoint = with_experts(checkpoint, sidecar)
    description = describe_checkpoint(checkpoint)
    if options.json:
        print_json(description)
    else:
        print(format_description(description))
    return 0
