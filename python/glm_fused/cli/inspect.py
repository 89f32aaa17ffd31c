"""``glm-fused inspect``: what a checkpoint is, what runs its layers, and what a token costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..streaming.options import RANGES, StreamOptions
from . import arguments
from .arguments import parsed_size
from .output import print_json

HELP = "say what a checkpoint is and what it costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=arguments.path, metavar="PATH", help=arguments.MODEL)
    group = parser.add_argument_group("experts that are streamed", "as `glm-fused generate` does")
    help = "with the experts of this sidecar"
    group.add_argument("--sidecar", type=arguments.path, metavar="DIR", help=help)
    help = "with as many slots as this holds, such as 24GB; or auto"
    group.add_argument("--memory-budget", metavar="SIZE", help=help)
    slots = arguments.integer(*RANGES["slots"])
    group.add_argument("--slots", type=slots, metavar="N", help="experts resident per layer")
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint.checked import checked
    from ..checkpoint.description import describe_checkpoint, format_description
    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.hub import local_model
    from ..checkpoint.layer_description import IN_MEMORY
    from ..streaming.banks import find_source, plan_streaming
    from ..streaming.flashmoe import with_experts

    checkpoint = Checkpoint.open(local_model(options.path))
    if options.sidecar is not None:
        checkpoint = with_experts(checkpoint, Path(options.sidecar))
    kind, plan = IN_MEMORY, None
    planned = options.memory_budget is not None or options.slots is not None
    if planned or options.sidecar is not None:
        args, inventory = checked(checkpoint)
        source = find_source(checkpoint, args, options.sidecar)
        kind = source.kind
        if planned:
            stream = StreamOptions(_budget(options.memory_budget), options.slots)
            plan = plan_streaming(inventory, args, source, stream, "auto")
    description = describe_checkpoint(checkpoint, kind, None if plan is None else plan.slots)
    if options.json:
        print_json(description)
    else:
        print(format_description(description))
        if plan is not None:
            print(f"\n{plan.format()}")
    return 0


def _budget(text: str | None) -> int | None:
    return None if text in (None, "auto") else parsed_size("--memory-budget", text)
