"""What the commands of expert streaming do."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .streaming import StreamOptions


def stream_options(args: argparse.Namespace, context: int) -> StreamOptions | None:
    """The options that were given; None without any of those that ask for streaming."""
    from .budget import parse_size
    from .pins import read_pins
    from .streaming import StreamOptions

    if args.memory_budget is None and args.slots is None and args.sidecar is None:
        if args.trace is not None:
            raise ValueError("--trace needs --memory-budget, --slots or --sidecar.")
        return None
    automatic = args.memory_budget in (None, "auto")
    return StreamOptions(
        budget=None if automatic else parse_size(args.memory_budget),
        slots=args.slots,
        context=args.context or context,
        sidecar=args.sidecar,
        policy=args.policy,
        pins={} if args.pins is None else read_pins(Path(args.pins)),
        spares=args.lookahead,
        direct=args.direct_io,
        depth=args.read_depth,
        split=parse_size(args.read_split),
    )


def run_pack(args: argparse.Namespace) -> int:
    from .pack import pack

    return _print_sidecar(pack(args.model, Path(args.path)), args.json)


def run_inspect(args: argparse.Namespace) -> int:
    from .sidecar import Sidecar

    return _print_sidecar(Sidecar.open(Path(args.path)), args.json)


def run_verify(args: argparse.Namespace) -> int:
    from .sidecar import Sidecar

    wrong = {}
    for file, problem in Sidecar.open(Path(args.path)).verify():
        if problem:
            wrong[file] = problem
        if not args.json:
            print(f"{file}  {problem or 'ok'}")
    if args.json:
        print(json.dumps({"ok": not wrong, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


def _print_sidecar(sidecar: Any, as_json: bool) -> int:
    from .budget import size

    files = [
        {
            "file": layer.file,
            "bytes": layer.size,
            "experts": len(layer.checksums),
            "slab_bytes": layer.slab,
            "parts": {p.name: f"{p.dtype} {list(p.shape)}" for p in layer.parts},
        }
        for layer in sidecar.layers
    ]
    if as_json:
        print(json.dumps({"path": str(sidecar.path), "set": sidecar.set_id, "files": files}))
        return 0
    print(f"{sidecar.path}: {size(sum(f['bytes'] for f in files))}, set {sidecar.set_id}")
    for f in files:
        print(f"  {f['file']}  {f['experts']} experts of {size(f['slab_bytes'])}")
    for name, text in files[0]["parts"].items():
        print(f"    {name:<18}{text}")
    return 0


def run_replay(args: argparse.Namespace) -> int:
    from .cli_streaming import POLICIES
    from .replay import format_replay, plot, replay
    from .trace import read_trace

    policies = args.policy.split(",")
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(f"--policy: {policy!r}, expected some of {', '.join(POLICIES)}.")
    rate = None if args.read_rate is None else _read_rate(args.read_rate)
    trace = read_trace(Path(args.trace))
    parts = (trace.experts * eighths // 8 for eighths in (1, 2, 4, 6))
    default = sorted({max(part, trace.top_k) for part in parts})
    banks = default if args.bank is None else _numbers(args.bank)
    result = replay(trace, banks, policies, rate, args.compute_ms / 1000)
    if args.plot:
        plot(result, Path(args.plot))
    print(json.dumps(result, indent=1) if args.json else format_replay(result), file=sys.stdout)
    return 0


def _numbers(text: str) -> list[int]:
    from .validation import MAX_SIZE, show

    with contextlib.suppress(ValueError):
        numbers = [int(number) for number in text.split(",")]
        if max(numbers) <= MAX_SIZE:
            return numbers
    raise ValueError(f"--bank: expected numbers of slots, found {show(text)}.")


def _read_rate(text: str) -> int:
    from .budget import parse_size

    rate = parse_size(text)
    if rate == 0:
        raise ValueError(f"--read-rate: expected bytes a second, found {text!r}.")
    return rate
