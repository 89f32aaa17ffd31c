"""``glm-fused replay``: what other banks and policies would have made of a trace."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from pathlib import Path

from ..streaming.options import POLICIES
from ..validation import MAX_SIZE, show
from . import arguments
from .arguments import UsageError

HELP = "hit rates of a trace for other banks and policies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("trace", type=arguments.path, metavar="FILE", help="what generate --trace wrote")
    help = "slots per layer (default: 1/8, 1/4, 1/2 and 3/4 of the experts)"
    add("--bank", metavar="N,N…", help=help)
    add("--policy", default="learned,lru,s3fifo", metavar="P,P…", help=f"of {', '.join(POLICIES)}")
    add("--read-rate", metavar="SIZE", help="bytes a second the SSD reads, to predict speeds")
    kind = arguments.number(lambda value: 0 <= value < math.inf, "a number of at least 0")
    add("--compute-ms", type=kind, metavar="MS", help="of a token without reads (default: 0)")
    help = "draw hit rates, and speeds (needs matplotlib)"
    add("--plot", type=arguments.path, metavar="FILE", help=help)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..streaming.replay import format_replay, plot, replay
    from ..streaming.trace import read_trace

    if options.compute_ms is not None and options.read_rate is None:
        raise UsageError("--compute-ms: needs --read-rate, to predict speeds.")
    policies = options.policy.split(",")
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(f"--policy: {policy!r}, expected some of {', '.join(POLICIES)}.")
    rate = None if options.read_rate is None else _read_rate(options.read_rate)
    trace = read_trace(Path(options.trace))
    parts = (trace.experts * eighths // 8 for eighths in (1, 2, 4, 6))
    default = sorted({max(part, trace.top_k) for part in parts})
    banks = default if options.bank is None else _numbers(options.bank)
    result = replay(trace, banks, policies, rate, (options.compute_ms or 0) / 1000)
    if options.plot:
        plot(result, Path(options.plot))
    print(json.dumps(result, indent=1) if options.json else format_replay(result))
    return 0


def _numbers(text: str) -> list[int]:
    with contextlib.suppress(ValueError):
        numbers = [int(number) for number in text.split(",")]
        if max(numbers) <= MAX_SIZE:
            return numbers
    raise UsageError(f"--bank: expected numbers of slots, found {show(text)}.")


def _read_rate(text: str) -> int:
    rate = arguments.parsed_size("--read-rate", text)
    if rate == 0:
        raise UsageError(f"--read-rate: expected bytes a second, found {text!r}.")
    return rate
