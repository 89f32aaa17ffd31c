"""``glm-fused generate``: continue a prompt, or compare both paths on it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..generation.limits import DEFAULT_TOKENS
from ..streaming.options import DEFAULT_CONTEXT
from . import arguments
from .arguments import MODEL, UsageError, flags
from .loading import engine_options, open_engine
from .output import discard, print_json, print_summary, write
from .progress import Progress
from .sampling import add_sampling, how_to_generate
from .sharding import add_shard, measured_gathers, shared, show_plan

if TYPE_CHECKING:
    from ..engine import Engine
    from ..generation.options import Options
    from ..models.line import Line
    from ..models.ranks import Ranks

HELP = "continue a prompt"
EXAMPLES = """\
examples:
  glm-fused generate --model PATH --prompt "What is a monad?"
  glm-fused generate --model PATH --prompt - --temp 0.7 --top-p 0.95 --stop "###" < prompt.txt
  glm-fused generate --model PATH --prompt "..." --ab --max-tokens 32
  glm-fused generate --model PATH --prompt "..." --draft auto
  glm-fused generate --model PATH --prompt "..." --memory-budget 24GB --sidecar DIR
  mlx.launch --hosts HOST1,HOST2 glm-fused generate --model PATH --prompt "..." --shard tensor
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
    add_sampling(parser)
    arguments.add_drafts(parser)
    arguments.add_streaming(parser)
    arguments.add_kv_format(parser)
    arguments.add_prefill_step(parser)
    add_shard(parser)
    arguments.add_threads(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    _check_ab(options)
    if options.trace is not None:
        arguments.new_file(options.trace)
    if options.shard is not None and options.prompt == "-":
        raise UsageError("--prompt -: not with --shard, as mlx.launch does not end stdin.")
    prompt = arguments.read_prompt(options.prompt)
    with shared(options, prompt) as ranks:
        return _run(options, prompt, ranks)


def _run(options: argparse.Namespace, prompt: str, ranks: Ranks | Line | None) -> int:
    context = DEFAULT_CONTEXT + (options.max_tokens or DEFAULT_TOKENS)
    loading = engine_options(options, context, ranks)
    with open_engine(options.model, options.threads, loading) as engine:
        plans = show_plan(engine, context)
        how = how_to_generate(options, engine.defaults)
        tokens = engine.encode(prompt, raw=options.raw)
        with Progress() as progress:
            if options.ab:
                return _compare(options, engine, tokens, how, progress)
            return _generate(options, engine, tokens, how, progress, plans)


def _generate(
    options: argparse.Namespace,
    engine: Engine,
    tokens: list[int],
    how: Options,
    progress: Progress,
    plans: dict[str, Any],
) -> int:
    def on_progress(what: str, done: int, total: int) -> None:
        if options.json or what == "prompt":  # the text itself shows how far generation is
            progress(what, done, total)

    sampling = _sampling(options, engine, how)
    with _traced(engine, options.trace, discard if options.json else write) as on_text:
        completion = engine.generate(tokens, how, on_text, on_progress=on_progress)
    gathers = measured_gathers(options, engine)
    if options.json:
        streaming = {"streaming": engine.streaming.stats()} if engine.streaming else {}
        shard = plans if gathers is None else plans | {"gathers": gathers}
        print_json(completion.describe() | {"sampling": sampling} | streaming | shard)
    else:
        print()
    if options.verbose or (sys.stderr.isatty() and not options.json):
        print_summary(completion, sampling, engine.streaming, gathers)
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
