"""python -m sim: compile a shader, check shader text, or find the executor."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from . import lint
from .compiler import compile_library, executor
from .library import Library
from .toolchain import CompileError


def _compile(options: argparse.Namespace) -> int:
    defines = dict(d.partition("=")[::2] for d in options.D)
    source = sys.stdin.read() if options.file == "-" else Path(options.file)
    try:
        path = compile_library(
            source,
            options.I,
            {name: value or "1" for name, value in defines.items()},
            options.contract,
            options.trace,
        )
    except (CompileError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    if options.o:
        shutil.copyfile(path, options.o)
    library = Library(path)
    contents = {
        "library": str(options.o or path),
        "executor": str(executor()),
        "kernels": [asdict(k) for k in library.kernels.values()],
        "constants": [asdict(c) for c in library.constants],
    }
    print(json.dumps(contents, indent=1))
    return 0


def _lint(options: argparse.Namespace) -> int:
    found = [p for file in options.files for p in lint.check(Path(file))]
    for problem in found:
        print(problem)
    return 1 if found else 0


def _runtime(_: argparse.Namespace) -> int:
    print(executor())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sim", description=__doc__)
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("compile", help="build a shader library; prints its kernels")
    build.add_argument("file", help="a Metal source file, or - for standard input")
    build.add_argument("-o", help="where to put the library (default: its place in the cache)")
    build.add_argument("-I", action="append", default=[], help="include directory")
    build.add_argument("-D", action="append", default=[], help="NAME or NAME=VALUE")
    build.add_argument("--contract", action="store_true", help="fuse a*b+c")
    build.add_argument("--trace", action="store_true", help="report races, strays and traffic")
    build.set_defaults(run=_compile)
    check = commands.add_parser("lint", help="what clang accepts and Apple's compiler would not")
    check.add_argument("files", nargs="+")
    check.set_defaults(run=_lint)
    runtime = commands.add_parser(
        "runtime", help="print the executor's path, building it if needed"
    )
    runtime.set_defaults(run=_runtime)
    options = parser.parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
