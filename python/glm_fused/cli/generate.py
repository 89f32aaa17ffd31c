"""``glm-fused generate``: continue a prompt, or compare both paths on it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..generation.limits import DEFAULT_TOKENS, SAMPLING
from ..streaming.options import DEFAULT_CONTEXT
from . import arguments
from .arguments import MODEL, UsageError, flags
from .loading import engine_options, open_engine
from .output import discard, print_json, print_summary, write
from .progress import Progress

if TYPE_CHECKING:
    from ..engine import Engine
    from ..generation.options import Options

HELP = "continue a prompt"
EXAMPLES = """\
examples:
  glm-fused generate --model PATH --prompt "What is a monad?"
  glm-fused generate --model PATH --prompt - --temp 0.7 --top-p 0.95 --stop "###" < prompt.txt
  glm-fused generate --model PATH --prompt "..." --ab --max-tokens 32
  glm-fused generate --model PATH --prompt "..." --draft auto
  glm-fused generate --model PATH --prompt "..." --memory-budget 24GB --sidecar DIR
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=arguments.path, metavar="PATH", help=MODEL)
    add("--prompt", required=True, metavar="TEXT", help="the prompt; - for stdin")
    arguments.add_length(parser, f"{DEFAULT_TOKENS}, or what the context has room for")
    add("--raw", action="store_true", help="do not apply the chat template")
    help = "end the text before the first TEXT in it (may be given more than once)"
    add("--stop", type=arguments.words, action="append", metavar="TEXT", help=help)
    add("--ab", action="store_true", help="run the fused and the reference path and compare bits")
    add("--verbose", action="store_true", help="speeds on stderr, in a pipe too")
    _add_sampling(parser)
    arguments.add_drafts(parser)
    arguments.add_streaming(parser)
    arguments.add_kv_format(parser)
    arguments.add_prefill_step(parser)
    arguments.add_threads(parser)
    arguments.add_json(parser)


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
        kind = arguments.within(SAMPLING[name])
        add(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=help)
    kind = arguments.integer(0, 2**64 - 1)
    add("--seed", type=kind, metavar="S", help="makes sampling reproducible")


def run(options: argparse.Namespace) -> int:
    _check_ab(options)
    if options.trace is not None:
        arguments.new_file(options.trace)
    prompt = arguments.read_prompt(options.prompt)
    context = DEFAULT_CONTEXT + (options.max_tokens or DEFAULT_TOKENS)
    loading = engine_options(options, context)
    with open_engine(options.model, options.threads, loading) as engine:
        if engine.streaming is not None:
            print(engine.streaming.plan.format(), file=sys.stderr)
        how = _how_to_generate(options, engine.defaults)
        tokens = engine.encode(prompt, raw=options.raw)
        with Progress() as progress:
            act = _compare if options.ab else _generate
            return act(options, engine, tokens, how, progress)


def _generate(
    options: argparse.Namespace,
    engine: Engine,
    tokens: list[int],
    how: Options,
    progress: Progress,
) -> int:
    def on_progress(what: str, done: int, total: int) -> None:
        if options.json or what == "prompt":  # the text itself shows how far generation is
            progress(what, done, total)

    sampling = _sampling(options, engine, how)
    with _traced(engine, options.trace, discard if options.json else write) as on_text:
        completion = engine.generate(tokens, how, on_text, on_progress=on_progress)
    if options.json:
        streaming = {"streaming": engine.streaming.stats()} if engine.streaming else {}
        print_json(completion.describe() | {"sampling": sampling} | streaming)
    else:
        print()
    if options.verbose or (sys.stderr.isatty() and not options.json):
        print_summary(completion, sampling, engine.streaming)
    return 0


def _compare(
    options: argparse.Namespace,
    engine: Engine,
    tokens: list[int],
    how: Options,
    progress: Progress,
) -> int:
    from .ab import compare, format_comparison

    comparison = compare(engine.model, tokens, how, progress, engine.drafts)
    if options.json:
        text = engine.tokenizer.decode(comparison.fused.tokens)
        sampling = _sampling(options, engine, how)
        print_json(comparison.describe() | {"text": text, "sampling": sampling})
    else:
        print(format_comparison(comparison))
    return 0 if comparison.bit_identical else 1


def _check_ab(options: argparse.Namespace) -> None:
    """Refuse what a comparison would ignore."""
    ignored = [name for name in ("stop", "trace") if options.ab and getattr(options, name)]
    if ignored:
        raise UsageError(
            f"{flags(ignored)}: not with --ab, which runs both paths for all of --max-tokens."
        )


def _how_to_generate(options: argparse.Namespace, defaults: Options) -> Options:
    """What the checkpoint asks for, with what the command line says instead."""
    values = {name: getattr(options, name) for name in SAMPLING}
    given = {name: value for name, value in values.items() if value is not None}
    seed = {} if options.seed is None else {"seed": options.seed}
    how = replace(
        defaults, max_tokens=options.max_tokens, stop=tuple(options.stop or ()), **seed, **given
    )
    _check_sampling(how, given)
    return how


def _check_sampling(how: Options, given: dict[str, Any]) -> None:
    """Refuse options that would do nothing.

    A seed is not refused, because greedy decoding is as reproducible as a seed asks for. Nor is an
    option with the value that means "do nothing", such as --top-p 1.
    """
    from ..generation.options import changed

    asked = [name for name in given if name in changed(how)]
    idle = [name for name in ("top_p", "top_k", "min_p") if how.greedy and name in asked]
    if idle:
        raise UsageError(
            f"{flags(idle)}: greedy decoding always takes the likeliest token; give --temp above"
            " 0 too."
        )
    if "repetition_context_size" in given and how.repetition_penalty == 1:
        raise UsageError("--repetition-context-size needs --repetition-penalty.")


def _sampling(options: argparse.Namespace, engine: Engine, how: Options) -> dict[str, Any]:
    """What was sampled from, and which of it the checkpoint's generation_config.json decided."""
    from ..generation.options import changed

    theirs = [name for name in changed(engine.defaults) if getattr(options, name) is None]
    return how.describe() | {"from_checkpoint": theirs}


@contextlib.contextmanager
def _traced(
    engine: Engine, path: str | None, write: Callable[[str], None]
) -> Iterator[Callable[[str], None]]:
    """Give the block a ``write`` that also appends to the trace file, if there is to be one."""
    if path is None:
        yield write
        return
    from ..streaming.replay import TraceWriter

    assert engine.streaming is not None  # else --trace was refused
    with open(path, "w") as file:
        trace = TraceWriter(engine.streaming, file, engine.model.args.num_experts_per_tok)

        def both(text: str) -> None:
            trace.write()
            write(text)

        yield both
        trace.write()
