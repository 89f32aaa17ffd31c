"""Arguments of expert streaming: options of ``generate``, ``sidecar`` and ``replay``."""

from __future__ import annotations

import argparse
import math
from typing import Any

from .arguments import DEFAULT_CONTEXT, integer, number, path
from .commands_streaming import run_inspect, run_pack, run_replay, run_verify

MODEL = 'folder of a checkpoint, or "demo", the bundled one'
POLICIES = ("learned", "lru", "s3fifo", "pinned")


def add_options(parser: argparse.ArgumentParser) -> None:
    """``generate``'s. Their defaults are None, which tells them from what was asked for."""
    text = "run a model larger than memory; the first three turn it on, the others need one of them"
    group = parser.add_argument_group("expert streaming", text)
    add = group.add_argument
    add(
        "--memory-budget",
        metavar="SIZE",
        help="keep within 24GB, say, reading experts as needed; or auto",
    )
    add("--slots", type=integer(1, 2**20), metavar="N", help="experts resident per layer")
    help = "read experts packed by `glm-fused sidecar pack`"
    add("--sidecar", type=path, metavar="DIR", help=help)
    help = f"tokens to plan the cache for (default: {DEFAULT_CONTEXT} and those to generate)"
    add("--context", type=integer(1, 2**31 - 1), metavar="N", help=help)
    help = f"which expert gives way: {', '.join(POLICIES)} (default: {POLICIES[0]})"
    add("--policy", choices=POLICIES, metavar="NAME", help=help)
    help = "JSON, {layer: [experts]}, for --policy pinned"
    add("--pins", type=path, metavar="FILE", help=help)
    help = "slots per layer for what the next layer's router may choose (default: 0)"
    add("--lookahead", type=integer(0, 2**20), metavar="N", help=help)
    add("--direct-io", action="store_true", default=None, help="read past the page cache")
    help = "reads in flight (default: 16)"
    add("--read-depth", type=integer(1, 256), metavar="N", help=help)
    add("--read-split", metavar="SIZE", help="bytes per read (default: 1MiB)")
    help = "write every request for experts, as JSON lines"
    add("--trace", type=path, metavar="FILE", help=help)


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """``sidecar pack|verify|inspect`` and ``replay``."""
    sidecar = commands.add_parser("sidecar", help="pack experts into files made for streaming")
    actions = sidecar.add_subparsers(dest="action", required=True, metavar="ACTION")
    pack = actions.add_parser("pack", help="write a sidecar; goes on where an earlier run ended")
    pack.add_argument("--model", required=True, type=path, metavar="PATH", help=MODEL)
    pack.set_defaults(run=run_pack)
    verify = actions.add_parser("verify", help="hash every file, or compare it with a checkpoint")
    verify.add_argument("--model", metavar="PATH", help="compare every byte with this checkpoint's")
    verify.set_defaults(run=run_verify)
    inspect = actions.add_parser("inspect", help="say what a sidecar holds")
    inspect.set_defaults(run=run_inspect)
    for action in (pack, verify, inspect):
        action.add_argument("path", type=path, metavar="DIR", help="folder of the sidecar")
        action.add_argument("--json", action="store_true", help="print one JSON document")

    replay = commands.add_parser("replay", help="hit rates of a trace for other banks and policies")
    replay.set_defaults(run=run_replay)
    add = replay.add_argument
    add("trace", type=path, metavar="FILE", help="what generate --trace wrote")
    help = "slots per layer (default: 1/8, 1/4, 1/2 and 3/4 of the experts)"
    add("--bank", metavar="N,N…", help=help)
    add("--policy", default="learned,lru,s3fifo", metavar="P,P…", help=f"of {', '.join(POLICIES)}")
    add("--read-rate", metavar="SIZE", help="bytes a second the SSD reads, to predict speeds")
    kind = number(lambda value: 0 <= value < math.inf, "a number of at least 0")
    add("--compute-ms", type=kind, metavar="MS", help="of a token without reads (default: 0)")
    add("--plot", type=path, metavar="FILE", help="draw hit rates, and speeds (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON document")
