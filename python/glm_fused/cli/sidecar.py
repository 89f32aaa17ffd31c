"""``glm-fused sidecar``: routed experts in files made for streaming, and what is in them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments

if TYPE_CHECKING:
    from ..streaming.flashmoe import FlashMoeSidecar
    from ..streaming.sidecar import Sidecar

HELP = "put experts into files made for streaming"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    help = "write a packed sidecar of a model; goes on where an earlier run ended"
    add = actions.add_parser("import", help=help)
    model = {"metavar": "PATH", "help": arguments.MODEL}
    add.add_argument("--model", required=True, type=arguments.path, **model)
    verify = actions.add_parser("verify", help="hash every file, or compare it with a model")
    verify.add_argument("--model", metavar="PATH", help="compare every byte with this model's")
    inspect = actions.add_parser("inspect", help="say what a sidecar holds")
    export = actions.add_parser("export", help="write a GGUF model as Flash-MoE has it")
    export.add_argument("--model", required=True, type=arguments.path, **model)
    for action in (add, verify, inspect, export):
        help = "folder of the sidecar"
        action.add_argument("path", type=arguments.path, metavar="DIR", help=help)
        arguments.add_json(action)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint.hub import local_model

    if getattr(options, "model", None) is not None:
        options.model = local_model(options.model)
    actions = {"import": _import, "verify": _verify, "inspect": _inspect, "export": _export}
    return actions[options.action](options)


def _import(options: argparse.Namespace) -> int:
    from ..streaming.pack import pack

    def say(line: str) -> None:
        print(f"glm-fused: {line}", file=sys.stderr)

    return _print_sidecar(pack(options.model, Path(options.path), say), options.json)


def _inspect(options: argparse.Namespace) -> int:
    from ..streaming.flashmoe import FlashMoeSidecar, is_flashmoe
    from ..streaming.sidecar import Sidecar

    if is_flashmoe(Path(options.path)):
        return _print_flashmoe(FlashMoeSidecar.open(Path(options.path)), options.json)
    return _print_sidecar(Sidecar.open(Path(options.path)), options.json)


def _export(options: argparse.Namespace) -> int:
    from ..streaming.flashmoe_export import DENSE, export

    sidecar = export(options.model, Path(options.path))
    dense = sidecar.path / DENSE
    found = {"path": str(sidecar.path), "tensors": len(sidecar.entries), "files": sidecar.files}
    found["model"] = str(dense)
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{sidecar.path}: {len(sidecar.entries)} tensors in {len(sidecar.files)} files")
        print(f"to run it: glm-fused generate --model {dense} --sidecar {sidecar.path} --prompt …")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ..streaming.flashmoe import is_flashmoe

    read = _read_flashmoe if is_flashmoe(Path(options.path)) else _read
    wrong = {}
    for name, problem in read(Path(options.path), options.model):
        if problem:
            wrong[name] = problem
        if not options.json:
            print(f"{name}  {problem or 'ok'}")
    if options.json:
        print(json.dumps({"ok": not wrong, "wrong": wrong}, indent=1))
    return 1 if wrong else 0


def _read(path: Path, model: str | None) -> Iterator[tuple[str, str]]:
    """Read a sidecar; yields what was read and what is wrong with it."""
    from ..streaming.sidecar import Sidecar
    from ..streaming.sidecar_identity import check_described, checked_source, verify

    sidecar, source = Sidecar.open(path), None
    if model is not None:
        checkpoint, source = checked_source(model)
        check_described(sidecar, checkpoint, source)
    return verify(sidecar, source)


def _read_flashmoe(path: Path, model: str | None) -> Iterator[tuple[str, str]]:
    """Read a Flash-MoE sidecar; yields what was read and what is wrong with it."""
    from ..streaming.flashmoe import FlashMoeSidecar
    from ..streaming.flashmoe_verify import Original, problems

    return problems(FlashMoeSidecar.open(path), None if model is None else Original.open(model))


def _print_flashmoe(sidecar: FlashMoeSidecar, as_json: bool) -> int:
    from ..memory import size

    files: list[dict[str, Any]] = [
        {
            "file": file,
            "bytes": nbytes,
            "tensors": {
                e.name: f"{e.type.name} {list(e.shape)}" for e in sidecar.entries if e.file == file
            },
        }
        for file, nbytes in sidecar.files.items()
    ]
    if as_json:
        print(json.dumps({"path": str(sidecar.path), "files": files}))
        return 0
    print(f"{sidecar.path}: {size(sum(f['bytes'] for f in files))}, of Flash-MoE")
    for f in files:
        print(f"  {f['file']}  {size(f['bytes'])}")
        for name, text in f["tensors"].items():
            print(f"    {name:<30}{text}")
    return 0


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
