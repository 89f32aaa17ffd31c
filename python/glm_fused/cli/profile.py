"""``glm-fused profile``: where the time of a decode step and of a prompt goes."""

from __future__ import annotations

import argparse

from ..generation.limits import MOST_DRAFTS
from . import arguments
from .arguments import MODEL
from .loading import engine_options, open_engine
from .output import print_json
from .progress import steps

HELP = "say where the time of a decode step and of a prompt goes"
PROMPT_TOKENS, REPEATS = 512, 25
EXAMPLES = """\
examples:
  glm-fused profile --model demo
  glm-fused profile --model PATH --prompt-tokens 8192 --threads 8 --plot step.png
  glm-fused profile --model PATH --verify 3
  glm-fused profile --model PATH --memory-budget 24GB --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, type=arguments.path, metavar="PATH", help=MODEL)
    kind = arguments.integer(1, 2**31 - 1)
    help = f"random tokens before the decode step (default: {PROMPT_TOKENS})"
    add("--prompt-tokens", type=kind, default=PROMPT_TOKENS, metavar="N", help=help)
    help = f"times that each is measured, for the medians (default: {REPEATS}, within 10 s)"
    add("--repeats", type=arguments.integer(1, 1000), default=REPEATS, metavar="N", help=help)
    help = "draw the step, stage by stage (needs matplotlib)"
    add("--plot", type=arguments.path, metavar="FILE", help=help)
    kind = arguments.integer(1, MOST_DRAFTS)
    help = "measure the step that checks N drafts, too"
    add("--verify", type=kind, default=0, metavar="N", help=help)
    arguments.add_streaming(parser, trace=False)
    arguments.add_kv_format(parser)
    arguments.add_prefill_step(parser)
    arguments.add_threads(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from .. import drawing
    from ..profiling import report
    from ..profiling.measure import profile

    target = None if options.plot is None else arguments.new_file(options.plot)
    figure = None if target is None else drawing.new_figure(9, 7)
    loading = engine_options(options, options.prompt_tokens + 2 + options.verify)
    with open_engine(options.model, options.threads, loading) as engine, steps() as step:
        result = profile(engine, options.prompt_tokens, options.repeats, step, options.verify)
    if figure is not None and target is not None:
        report.draw(result, figure)
        drawing.save(figure, target)
    if options.json:
        print_json(result)
    else:
        report.print_profile(result)
    return 0
