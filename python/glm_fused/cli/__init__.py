"""The ``glm-fused`` command: its arguments, exit codes and errors."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from ..selftest.doctor import VARIABLES
from . import options_streaming
from .arguments import DEFAULT_TOKENS, SAMPLING, UsageError, integer, path, words
from .commands import run_demo, run_doctor, run_generate, run_inspect, run_selftest
from .options_streaming import MODEL

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 plus the signal, as a shell reports it
OUR_FAULT = 70  # EX_SOFTWARE of sysexits.h
LONGEST = 900  # characters of an error
EXPECTED = (ImportError, OSError, RuntimeError, ValueError)
UNEXPECTED = (RecursionError, NotImplementedError)  # though they are RuntimeErrors
MAX_THREADS = 1024
KV_FORMATS = ("auto", "bf16", "fp16", "fp32", "fp8", "int8")  # those of rows.py, without mlx
BACKENDS = ("cpu", "metal", "metal-sim", "all-available")
EXAMPLES = """\
examples:
  glm-fused demo                                          # the bundled model, on both paths
  glm-fused generate --model demo --prompt "def main():"  # the same model, any prompt
  glm-fused inspect PATH                                  # what a checkpoint is and needs
  glm-fused generate --model PATH --prompt "..." --memory-budget 24GB
  glm-fused COMMAND --help                                # all options of a command
"""
GENERATE_EXAMPLES = """\
examples:
  glm-fused generate --model PATH --prompt "What is a monad?"
  glm-fused generate --model PATH --prompt - --temp 0.7 --top-p 0.95 --stop "###" < prompt.txt
  glm-fused generate --model PATH --prompt "..." --ab --max-tokens 32
  glm-fused generate --model PATH --prompt "..." --memory-budget 24GB --sidecar DIR
"""
EXIT_CODES = """\
exit codes:
  0  success
  1  a check failed: paths differ in bits, a file is damaged
  2  an error, which is one line on stderr
  70 a bug of glm-fused
  130, 141  interrupted; the reader of the output went away
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is success, 1 a failed check, 2 an error, which is one line on stderr; 70 is a bug.
    """
    if sys.stdout is None:  # what Python makes of a closed one
        return _failed(OSError("stdout is closed."))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return BROKEN_PIPE
    except UsageError as error:
        print(args.parser.complaint(str(error).removesuffix(".")), file=sys.stderr, end="")
        return 2
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
    with contextlib.suppress(OSError):  # where stderr takes nothing, the exit code still tells
        print(f"glm-fused: {text}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    """Without what a file or an argument may have put into it: line ends, thousands of letters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


def _debugging() -> bool:
    from ..ops.paths import flag

    return flag("GLM_FUSED_DEBUG")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=form, **kwargs)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        self.exit(2, self.complaint(message))

    def complaint(self, message: str) -> str:
        """One line about arguments that do not fit, with where they are explained."""
        return f"glm-fused: error: {_one_line(message)} (see {self.prog} --help)\n"


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        parser.exit(message=f"glm-fused {metadata.version('glm-fused')}\n")


def _parser() -> argparse.ArgumentParser:
    variables = "".join(f"  {name:<22} {effect}\n" for name, effect in VARIABLES.items())
    parser = _Parser(
        prog="glm-fused",
        description="GLM-5 on MLX, checked bit for bit.",
        epilog=f"{EXAMPLES}\n{EXIT_CODES}\nenvironment variables:\n{variables}",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="continue a prompt", epilog=f"{GENERATE_EXAMPLES}\n{EXIT_CODES}"
    )
    generate.set_defaults(run=run_generate)
    _add_generate(generate)

    demo = commands.add_parser("demo", help="try the small checkpoint that comes with the package")
    demo.set_defaults(run=run_demo)
    demo.add_argument("--prompt", metavar="TEXT", help="Python to continue; - for stdin")
    _add_length(demo, "64")

    doctor = commands.add_parser("doctor", help="check the installation and this machine")
    doctor.set_defaults(run=run_doctor)

    selftest = commands.add_parser("selftest", help="check every kernel, measure, make a report")
    selftest.set_defaults(run=run_selftest)
    _add_selftest(selftest)

    inspect = commands.add_parser("inspect", help="say what a checkpoint is and what it costs")
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("path", type=path, metavar="PATH", help=MODEL)

    options_streaming.add_commands(commands)

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
    add("--model", required=True, type=path, metavar="PATH", help=MODEL)
    add("--prompt", required=True, metavar="TEXT", help="the prompt; - for stdin")
    _add_length(parser, f"{DEFAULT_TOKENS}, or what the context has room for")
    add("--raw", action="store_true", help="do not apply the chat template")
    help = "end the text before the first TEXT in it (may be given more than once)"
    add("--stop", type=words, action="append", metavar="TEXT", help=help)
    add("--ab", action="store_true", help="run the fused and the reference path and compare bits")
    add("--verbose", action="store_true", help="speeds on stderr, in a pipe too")
    _add_sampling(parser)
    options_streaming.add_options(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    text = (
        "as in mlx-lm; defaults are those of the checkpoint's generation_config.json, greedy "
        "without one or\nwhere its do_sample is not true"
    )
    add = parser.add_argument_group("sampling", text).add_argument
    for name, metavar, help in (
        ("temp", "T", "temperature; 0: greedy"),
        ("top_p", "P", "sample from the likeliest tokens of this probability together"),
        ("top_k", "K", "sample from this many of the likeliest tokens; 0: from all"),
        ("min_p", "P", "sample from tokens this likely, relative to the likeliest"),
        ("repetition_penalty", "X", "make repeated tokens less likely; 1: do not"),
        ("repetition_context_size", "N", "tokens that the penalty looks back (default: 20)"),
    ):
        add(f"--{name.replace('_', '-')}", type=SAMPLING[name].parse, metavar=metavar, help=help)
    add("--seed", type=integer(0, 2**64 - 1), metavar="S", help="makes sampling reproducible")


def _add_selftest(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = f"{', '.join(BACKENDS)} (default: all-available)"
    add("--backend", choices=BACKENDS, default="all-available", metavar="NAME", help=text)
    add("--quick", action="store_true", help="a part of the cases, under half a minute")
    add("--no-bench", dest="bench", action="store_false", help="do not measure speed")
    text = "write the report to FILE; - prints it instead of a summary"
    add("--json", type=path, metavar="FILE", help=text)


def _add_length(parser: argparse.ArgumentParser, default: str) -> None:
    kind = integer(1, 2**31 - 1)
    text = f"tokens to generate (default: {default})"
    parser.add_argument("--max-tokens", type=kind, metavar="N", help=text)
