"""``glm-fused chat``: a conversation with a model."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ..streaming.options import DEFAULT_CONTEXT
from . import arguments
from .loading import engine_options, open_engine
from .sampling import add_sampling, how_to_generate

if TYPE_CHECKING:
    from .chat_screen import Screen

HELP = "talk with a model"
MAX_TOKENS = 2048  # of an answer, where nobody says
EXAMPLES = """\
In a terminal Enter sends a message; after a \\, and with Alt, it begins a new line. Ctrl-C ends an
answer, Ctrl-D the chat. Elsewhere stdin has a message a line (a \\ at the end takes the next one to
it), and stdout gets the answers alone, each with a line break. /help lists commands for both; a
message that begins with / is written with two.

examples:
  glm-fused chat --model PATH --system "You answer in one sentence." --temp 0.7
  printf '%s\\n' "What is a monad?" "And an arrow?" | glm-fused chat --model PATH
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=arguments.path, metavar="PATH", help=arguments.MODEL)
    add("--system", type=arguments.words, metavar="TEXT", help="what the model is told first")
    add("--load", type=arguments.path, metavar="FILE", help="go on with what /save wrote")
    arguments.add_length(parser, f"of an answer {MAX_TOKENS}, or what the context has room for")
    help = "keep no file of the messages, $XDG_STATE_HOME/glm-fused/chat_history"
    add("--no-history", action="store_true", help=help)
    add_sampling(parser)
    arguments.add_drafts(parser)
    arguments.add_streaming(parser, trace=False)
    arguments.add_kv_format(parser)
    arguments.add_prefill_step(parser)
    arguments.add_threads(parser)


def run(options: argparse.Namespace) -> int:
    from .chat_loop import Chat

    if options.max_tokens is None:
        options.max_tokens = MAX_TOKENS
    screen = _screen(options)
    loading = engine_options(options, DEFAULT_CONTEXT + options.max_tokens)
    with open_engine(options.model, options.threads, loading) as engine:
        if engine.streaming is not None:
            print(engine.streaming.plan.format(), file=sys.stderr)
        chat = Chat(engine, how_to_generate(options, engine.defaults), screen)
        if options.load is not None:
            chat.load(options.load)
        if options.system is not None:
            chat.system(options.system)
        chat.run()
    return 0


def _screen(options: argparse.Namespace) -> Screen:
    from .chat_loop import COMMANDS
    from .chat_screen import Pipe, Terminal, history_file

    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return Pipe()
    return Terminal(list(COMMANDS), None if options.no_history else history_file())
