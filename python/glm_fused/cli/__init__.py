"""The ``glm-fused`` command: its exit codes and errors.

Each command is a module with ``HELP``, ``add_arguments(parser)`` and ``run(options)``, which
returns the exit code. It imports what it needs when it runs, so that help is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

from ..environment import VARIABLES, flag
from . import (
    chat,
    completion,
    convert,
    demo,
    doctor,
    generate,
    inspect,
    plan,
    profile,
    replay,
    selftest,
    serve,
    sidecar,
)
from .arguments import UsageError

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 plus the signal, as a shell reports it
OUR_FAULT = 70  # EX_SOFTWARE of sysexits.h
LONGEST = 900  # how many characters of an error are shown
EXPECTED = (ImportError, OSError, RuntimeError, ValueError)
UNEXPECTED = (RecursionError, NotImplementedError)  # bugs, although they are RuntimeErrors
COMMANDS = (
    generate, chat, serve, demo, doctor, selftest, profile, inspect, plan, convert, sidecar, replay,
    completion,
)  # fmt: skip
EXAMPLES = """\
examples:
  glm-fused demo                                          # the bundled model, on both paths
  glm-fused generate --model demo --prompt "def main():"  # the same model, any prompt
  glm-fused inspect PATH                                  # what a checkpoint is and needs
  glm-fused generate --model PATH --prompt "..." --memory-budget 24GB
  glm-fused COMMAND --help                                # all options of a command
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

    The exit code is 0 for success, 1 for a failed check, 2 for an error, which is one line on
    stderr, 70 for a bug, 130 for an interrupt, and 141 where nobody reads the output any more.
    """
    if sys.stdout is None:  # Python makes None of a closed stdout
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        return BROKEN_PIPE
    except UsageError as error:
        print(args.parser.complaint(str(error).removesuffix(".")), file=sys.stderr, end="")
        return 2
    except Exception as error:
        if flag("GLM_FUSED_DEBUG"):
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
    """``text`` in one line of bearable length, whatever a file or an argument put into it."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=form, **kwargs)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        self.exit(2, self.complaint(message))

    def complaint(self, message: str) -> str:
        """One line about arguments that do not fit, which says where they are explained."""
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
    parser.set_defaults(root=parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        examples = getattr(command, "EXAMPLES", None)
        epilog = None if examples is None else f"{examples}\n{EXIT_CODES}"
        subparser = commands.add_parser(name, help=command.HELP, epilog=epilog)
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser
