"""The ``glm-fused`` command: its arguments, exit codes and errors."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from . import cli_streaming
from .arguments import integer, number
from .commands import run_demo, run_doctor, run_generate, run_inspect, run_selftest

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 plus the signal, as a shell reports it
OUR_FAULT = 70  # EX_SOFTWARE of sysexits.h
LONGEST = 900  # characters of an error
EXPECTED = (ImportError, OSError, RuntimeError, ValueError)
UNEXPECTED = (RecursionError, NotImplementedError)  # though they are RuntimeErrors
MAX_THREADS = 1024
KV_FORMATS = ("auto", "bf16", "fp16", "fp32", "fp8", "int8")  # those of rows.py, without mlx
BACKENDS = ("cpu", "metal", "metal-sim", "all-available")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 a failed check, 2 an error, which is one line on stderr; 70 is a bug.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return BROKEN_PIPE
    except Exception as error:
        if _debugging():
            raise
        return _failed(error)


def _failed(error: Exception) -> int:
    """Say in one line what went wrong; the exit code tells a bug from what a user can mend."""
    text = _one_line(str(error))
    if isinstance(error, MemoryError):
        code, text = 2, f"error: out of memory{f': {text}' if text else '.'}"
    elif isinstance(error, EXPECTED) and not isinstance(error, UNEXPECTED):
        code, text = 2, f"error: {text}"
    else:
        code = OUR_FAULT
        text = (
            f"a bug of glm-fused: {type(error).__name__}: {text} (please report it, with what"
            " GLM_FUSED_DEBUG=1 prints)"
        )
    print(f"glm-fused: {text}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    """Without what a file or an argument may have put into it: line ends, thousands of letters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def _debugging() -> bool:
    from .paths import flag

    return flag("GLM_FUSED_DEBUG")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"glm-fused: error: {_one_line(message)}\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        parser.exit(message=f"glm-fused {metadata.version('glm-fused')}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="glm-fused", description="GLM-5 on MLX, checked bit for bit.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.set_defaults(run=run_generate)
    _add_generate(generate)

    demo = commands.add_parser("demo", help="try the small checkpoint that comes with the package")
    demo.set_defaults(run=run_demo)
    demo.add_argument("--prompt", metavar="TEXT", help="Python to continue; - for stdin")
    _add_length(demo, 64)

    doctor = commands.add_parser("doctor", help="check the installation and this machine")
    doctor.set_defaults(run=run_doctor)

    selftest = commands.add_parser("selftest", help="check every kernel, measure, make a report")
    selftest.set_defaults(run=run_selftest)
    _add_selftest(selftest)

    inspect = commands.add_parser("inspect", help="say what a checkpoint is and what it costs")
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("path", metavar="PATH", help="folder of a checkpoint")

    cli_streaming.add_commands(commands)

    for command in (generate, demo):
        text = "how the cache stores keys (default: as the activations)"
        command.add_argument("--kv-format", choices=KV_FORMATS, default="auto", help=text)
    for command in (generate, demo, doctor, selftest):
        threads = integer(1, MAX_THREADS)
        command.add_argument("--threads", type=threads, metavar="N", help="of the CPU kernels")
    for command in (generate, demo, doctor, inspect):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="folder of a checkpoint")
    add("--prompt", required=True, metavar="TEXT", help="the prompt; - for stdin")
    _add_length(parser, 256)
    kind = number(lambda value: 0 <= value < math.inf, "a number of at least 0")
    add("--temp", type=kind, default=0.0, metavar="T", help="temperature; 0 (default): greedy")
    kind = number(lambda value: 0 < value <= 1, "a number above 0, up to 1")
    add("--top-p", type=kind, default=1.0, metavar="P", help="nucleus of this probability")
    add("--seed", type=integer(0, 2**64 - 1), metavar="S", help="makes sampling reproducible")
    add("--raw", action="store_true", help="do not apply the chat template")
    add("--ab", action="store_true", help="run the fused and the reference path and compare bits")
    add("--verbose", action="store_true", help="speeds on stderr, in a pipe too")
    cli_streaming.add_options(parser)


def _add_selftest(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = f"{', '.join(BACKENDS)} (default: all-available)"
    add("--backend", choices=BACKENDS, default="all-available", metavar="NAME", help=text)
    add("--quick", action="store_true", help="a part of the cases, under half a minute")
    add("--no-bench", dest="bench", action="store_false", help="do not measure speed")
    add("--json", metavar="FILE", help="write the report to FILE; - prints it instead of a summary")


def _add_length(parser: argparse.ArgumentParser, default: int) -> None:
    kind = integer(1, 2**31 - 1)
    text = f"tokens to generate (default: {default})"
    parser.add_argument("--max-tokens", type=kind, default=default, metavar="N", help=text)
