"""What the commands of expert streaming do."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import UsageError

if TYPE_CHECKING:
    from ..streaming.banks import StreamOptions


_STARTING = ("memory_budget", "slots", "sidecar")
_NEEDING_THEM = (
    "context", "policy", "pins", "lookahead", "direct_io", "read_depth", "read_split", "trace",
)  # fmt: skip


def stream_options(args: argparse.Namespace, context: int) -> StreamOptions | None:
    """The options that were given; None without any of those that ask for streaming.

    ``context`` is what memory is planned for unless ``--context`` says otherwise.
    """
    given = {
        name: value
        for name in (*_STARTING, *_NEEDING_THEM)
        if (value := getattr(args, name)) is not None
    }
    if not given.keys() & set(_STARTING):
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UsageError(f"{flags}: needs --memory-budget, --slots or --sidecar.")
        return None
    if ("pins" in given) != (given.get("policy") == "pinned"):
        raise UsageError("--pins and --policy pinned need one another.")
    from ..streaming.banks import StreamOptions
    from ..streaming.pins import read_pins

    names = ("slots", "sidecar", "context", "policy")
    other_names = {"lookahead": "spares", "direct_io": "direct", "read_depth": "depth"}
    options: dict[str, Any] = {name: given[name] for name in names if name in given}
    options |= {new: given[name] for name, new in other_names.items() if name in given}
    if given.get("memory_budget", "auto") != "auto":
        options["budget"] = _size("--memory-budget", args.memory_budget)
    if "read_split" in given:
        options["split"] = _size("--read-split", args.read_split)
    if "pins" in given:
        options["pins"] = read_pins(Path(args.pins))
    return StreamOptions(default_context=context, **options)


def _size(flag: str, text: str) -> int:
    from ..streaming.budget import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from None


def run_pack(args: argparse.Namespace) -> int:
    from ..streaming.pack import pack

    def say(line: str) -> None:
        print(f"glm-fused: {line}", file=sys.stderr)

    return _print_sidecar(pack(args.model, Path(args.path), say), args.json)


def run_inspect(args: argparse.Namespace) -> int:
    from ..streaming.sidecar import Sidecar

    return _print_sidecar(Sidecar.open(Path(args.path)), args.json)


def run_verify(args: argparse.Namespace) -> int:
    from ..streaming.sidecar import Sidecar
    from ..streaming.sidecar_identity import check_described, checked_source, verify

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
    from ..streaming.budget import size

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
    from ..streaming.replay import format_replay, plot, replay
    from ..streaming.trace import read_trace
    from .options_streaming import POLICIES

    if args.compute_ms is not None and args.read_rate is None:
        raise UsageError("--compute-ms: needs --read-rate, to predict speeds.")
    policies = args.policy.split(",")
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(f"--policy: {policy!r}, expected some of {', '.join(POLICIES)}.")
    rate = None if args.read_rate is None else _read_rate(args.read_rate)
    trace = read_trace(Path(args.trace))
    parts = (trace.experts * eighths // 8 for eighths in (1, 2, 4, 6))
    default = sorted({max(part, trace.top_k) for part in parts})
    banks = default if args.bank is None else _numbers(args.bank)
    result = replay(trace, banks, policies, rate, (args.compute_ms or 0) / 1000)
    if args.plot:
        plot(result, Path(args.plot))
    print(json.dumps(result, indent=1) if args.json else format_replay(result), file=sys.stdout)
    return 0


def _numbers(text: str) -> list[int]:
    from ..validation import MAX_SIZE, show

    with contextlib.suppress(ValueError):
        numbers = [int(number) for number in text.split(",")]
        if max(numbers) <= MAX_SIZE:
            return numbers
    raise UsageError(f"--bank: expected numbers of slots, found {show(text)}.")


def _read_rate(text: str) -> int:
    rate = _size("--read-rate", text)
    if rate == 0:
        raise UsageError(f"--read-rate: expected bytes a second, found {text!r}.")
    return rate
