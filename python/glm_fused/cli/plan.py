"""``glm-fused plan``: whether machines that share a model fit it, and what a token takes there."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..memory import parse_size
from ..streaming.options import RANGES
from . import arguments
from .arguments import UsageError
from .output import print_json
from .sharding import AUTO, CONTEXT, PIPELINE, TENSOR

if TYPE_CHECKING:
    from ..measuring.cluster import Link, Machine

HELP = "say what machines that share a model need, and how fast they can be"
EXAMPLES = """\
examples:
  glm-fused plan --model PATH --machine 256GB,692GB/s --machine 256GB,692GB/s --link 50us,5GB/s
  glm-fused plan --model ORG/NAME --machine 512GB,692GB/s --context 131072
  glm-fused plan --model PATH --machine 96GB,410GB/s --machine 512GB,692GB/s --shard pipeline
"""
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=arguments.path, metavar="PATH", help=arguments.MODEL)
    help = "memory, and how fast it is read, of a machine (once for each)"
    add("--machine", required=True, action="append", type=_machine, metavar="SIZE,RATE", help=help)
    help = "latency and rate between machines (default: 50us,5GB/s)"
    add("--link", type=_link, default="50us,5GB/s", metavar="TIME,RATE", help=help)
    help = "how they share it: rows (tensor), layers (pipeline), or whichever fits and is quicker"
    add("--shard", choices=(TENSOR, PIPELINE, AUTO), default=AUTO, help=f"{help} (auto, default)")
    kind = arguments.integer(*RANGES["context"])
    add("--context", type=kind, default=CONTEXT, metavar="N", help=f"tokens cached ({CONTEXT})")
    arguments.add_kv_format(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint.folder import Checkpoint
    from ..checkpoint.hub import local_model
    from ..measuring.placement import format_plans, plan_shards

    if options.shard != AUTO and len(options.machine) == 1:
        raise UsageError("--shard: expected two machines or more, which share the model.")
    ways = (TENSOR, PIPELINE) if options.shard == AUTO else (options.shard,)
    checkpoint = Checkpoint.open(local_model(options.model))
    how = options.machine, options.link, options.context, options.kv_format
    found = plan_shards(checkpoint, *how, ways)
    if options.json:
        print_json({"model": options.model} | found)
    else:
        print("\n".join([options.model, *format_plans(found)]))
    return 0 if found["fits"] else 1


def _machine(text: str) -> Machine:
    from ..measuring.cluster import Machine

    memory, _, rate = text.partition(",")
    try:
        return Machine(parse_size(memory), _rate(rate))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected one such as 256GB,692GB/s: {text!r}") from None


def _link(text: str) -> Link:
    from ..measuring.cluster import Link

    latency, _, rate = text.partition(",")
    number = latency.rstrip("ums")
    try:
        seconds = float(number) * _SECONDS[latency[len(number) :]]
        if not 0 <= seconds < 60:
            raise ValueError
        return Link(seconds, _rate(rate))
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"expected one such as 50us,5GB/s: {text!r}") from None


def _rate(text: str) -> int:
    rate = parse_size(text.removesuffix("/s"))
    if rate == 0:
        raise ValueError
    return rate
