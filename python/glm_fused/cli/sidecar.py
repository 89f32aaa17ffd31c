"""``glm-fused sidecar``: pack experts into files made for streaming, and look after them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments

if TYPE_CHECKING:
    from ..streaming.sidecar import Sidecar

HELP = "pack experts into files made for streaming"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    pack = actions.add_parser("pack", help="write a sidecar; goes on where an earlier run ended")
    model = {"metavar": "PATH", "help": arguments.MODEL}
    pack.add_argument("--model", required=True, type=arguments.path, **model)
    verify = actions.add_parser("verify", help="hash every file, or compare it with a checkpoint")
    verify.add_argument("--model", metavar="PATH", help="compare every byte with this checkpoint's")
    inspect = actions.add_parser("inspect", help="say what a sidecar holds")
    for action in (pack, verify, inspect):
        help = "folder of the sidecar"
        action.add_argument("path", type=arguments.path, metavar="DIR", help=help)
        arguments.add_json(action)


def run(options: argparse.Namespace) -> int:
    actions = {"pack": _pack, "verify": _verify, "inspect": _inspect}
    return actions[options.action](options)


def _pack(options: argparse.Namespace) -> int:
    from ..streaming.pack import pack

    def say(line: str) -> None:
        print(f"glm-fused: {line}", file=sys.stderr)

    return _print_sidecar(pack(options.model, Path(options.path), say), options.json)


def _inspect(options: argparse.Namespace) -> int:
    from ..streaming.sidecar import Sidecar

    return _print_sidecar(Sidecar.open(Path(options.path)), options.json)


def _verify(options: argparse.Namespace) -> int:
    from ..streaming.sidecar import Sidecar
    from ..streaming.sidecar_identity import check_described, checked_source, verify

    sidecar, source, wrong = Sidecar.open(Path(options.path)), None, {}
    if options.model is not None:
        checkpoint, source = checked_source(options.model)
        check_described(sidecar, checkpoint, source)
    for file, problem in verify(sidecar, source):
        if problem:
            wrong[file] = problem
        if not options.json:
            print(f"{file}  {problem or 'ok'}")
    if options.json:
        print(json.dumps({"ok": not wrong, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


def _print_sidecar(sidecar: Sidecar, as_json: bool) -> int:
    from ..memory import size

    files: list[dict[str, Any]] = [
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
