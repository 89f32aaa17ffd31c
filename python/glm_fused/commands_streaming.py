"""What the commands of expert streaming do."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .streaming import StreamOptions


def stream_options(args: argparse.Namespace, context: int) -> StreamOptions | None:
    """The options that were given; None without any of those that ask for streaming."""
    from .budget import parse_size
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
        pins={} if args.pins is None else _read_pins(Path(args.pins)),
        spares=args.lookahead,
        direct=args.direct_io,
        depth=args.read_depth,
        split=parse_size(args.read_split),
    )


def _read_pins(path: Path) -> dict[int, list[int]]:
    from .checkpoint import read_json
    from .validation import show

    pins = read_json(path)
    for layer, experts in pins.items():
        numbers = isinstance(experts, list) and all(type(e) is int and e >= 0 for e in experts)
        if not layer.isdecimal() or not numbers:
            raise ValueError(f"{path}: {show({layer: experts})}, expected {{layer: [experts]}}.")
    return {int(layer): experts for layer, experts in pins.items()}


def run_pack(args: argparse.Namespace) -> int:
    from .pack import pack

    def say(line: str) -> None:
        print(f"glm-fused: {line}", file=sys.stderr)

    return _print_sidecar(pack(args.model, Path(args.path), say), args.json)


def run_inspect(args: argparse.Namespace) -> int:
    from .sidecar import Sidecar

    return _print_sidecar(Sidecar.open(Path(args.path)), args.json)


def run_verify(args: argparse.Namespace) -> int:
    from .sidecar import Sidecar
    from .sidecar_identity import check_described, checked_source, verify

    sidecar, source, wrong = Sidecar.open(Path(args.path)), None, {}
    if args.model is not None:
        checkpoint, source = checked_source(args.model)
        check_described(sidecar, checkpoint, source)
    for file, problem in verify(sidecar, source):
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
    from .replay import format_replay, plot, read_trace, replay

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
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--bank: expected numbers of slots, found {text!r}.") from None


def _read_rate(text: str) -> int:
    from .budget import parse_size

    rate = parse_size(text)
    if rate == 0:
        raise ValueError(f"--read-rate: expected bytes a second, found {text!r}.")
    return rate
