"""``glm-fused completion``: a script with which a shell completes commands, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from . import arguments

HELP = "print what makes a shell complete this command"
SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = """\
examples:
  glm-fused completion bash > ~/.local/share/bash-completion/completions/glm-fused
  glm-fused completion zsh > DIR/_glm-fused       # DIR is one of $fpath
  glm-fused completion tcsh > ~/.glm-fused.csh    # and `source ~/.glm-fused.csh` in ~/.tcshrc
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, metavar="|".join(SHELLS), help="for this shell")


def run(options: argparse.Namespace) -> int:
    import shtab

    for action in _actions(options.root):
        if action.type in (arguments.path, arguments.new_file):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(options.root, options.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options and arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        choices: Any = action.choices
        if isinstance(action, argparse._SubParsersAction):
            for inner in dict.fromkeys(choices.values()):
                yield from _actions(inner)
