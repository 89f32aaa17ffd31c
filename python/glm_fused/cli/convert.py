"""``glm-fused convert``: a checkpoint as a GGUF file or in MLX's formats."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import arguments
from .arguments import UsageError, flags, parsed_size

if TYPE_CHECKING:
    from ..formats.weights import Format

HELP = "write a checkpoint as a GGUF file or in MLX's formats"
EXAMPLES = """\
examples:
  glm-fused convert --model PATH model.gguf --experts q4_0 --dense q8_0
  glm-fused convert --model PATH FOLDER --experts mxfp4 --dense affine8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = {"metavar": "PATH", "help": arguments.MODEL}
    parser.add_argument("--model", required=True, type=arguments.path, **model)
    help = "what to write: a file NAME.gguf, or a new folder for MLX"
    parser.add_argument("out", type=arguments.path, metavar="OUT", help=help)
    help = "of routed experts (default: as they are; what OUT cannot hold becomes bfloat16)"
    parser.add_argument("--experts", type=arguments.words, metavar="TYPE", help=help)
    help = "of other matrices; indexers take floats alone, routers none (default: the same)"
    parser.add_argument("--dense", type=arguments.words, metavar="TYPE", help=help)
    help = "write a GGUF in shards NAME-00001-of-0000N.gguf of about so many bytes, such as 48GB"
    parser.add_argument("--shard-size", metavar="SIZE", help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace a GGUF file")
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint.hub import local_model
    from ..checkpoint.paths import GGUF
    from ..conversion import gguf, mlx
    from ..conversion.target import Types
    from ..memory import size
    from .output import print_json

    def say(line: str) -> None:
        print(f"glm-fused: {line}", file=sys.stderr)

    out = Path(options.out).expanduser()
    of_gguf = out.suffix.lower() == GGUF
    known = gguf.TYPES if of_gguf else mlx.TYPES
    types = Types(
        _format("--experts", options.experts, known), _format("--dense", options.dense, known)
    )
    model = local_model(options.model)
    if of_gguf:
        text = options.shard_size
        shard = None if text is None else parsed_size("--shard-size", text)
        paths = gguf.to_gguf(model, out, types, options.overwrite, shard, say)
        out = paths[0]
    else:
        for name in ("overwrite", "shard_size"):
            if getattr(options, name):
                flag = flags([name])
                raise UsageError(f"{flag} is for a {GGUF} file, and {options.out} is none.")
        paths = mlx.to_mlx(model, out, types)
    nbytes = sum(path.stat().st_size for path in paths)
    if options.json:
        print_json({"path": str(out), "files": len(paths), "bytes": nbytes})
    else:
        print(f"{out}: {size(nbytes)}" + (f" in {len(paths)} files" if len(paths) > 1 else ""))
    return 0


def _format(flag: str, name: str | None, known: tuple[str, ...]) -> Format | None:
    from ..formats.weights import FORMATS
    from ..validation import show

    if name is not None and name not in known:
        raise UsageError(f"{flag}: {show(name)}, expected one of {', '.join(known)}.")
    return None if name is None else FORMATS[name]
