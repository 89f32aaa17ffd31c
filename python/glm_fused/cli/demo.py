"""``glm-fused demo``: the bundled checkpoint continues some Python, on both paths."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import arguments
from .loading import open_engine
from .output import discard, print_json, write
from .progress import Progress

if TYPE_CHECKING:
    from ..engine import Engine
    from ..generation.generate import OnProgress
    from ..generation.options import Options

HELP = "try the small checkpoint that comes with the package"
ABOUT = """\
An 8 M parameter model of GLM-5.2's shape (experts, sparse attention, shared indexers), trained on
Python's standard library: it shows that the kernels work, and is not good for anything else."""

PROMPT = '''\
import os
import json


def read_config(path, default=None):
    """Read a JSON file and return its contents as a dictionary."""
    if not os.path.exists(path):
        if default is None:
            raise FileNotFoundError(path)
        return default
    with open(path, "r", encoding="utf-8") as f:
        data = json.load(f)
    if not isinstance(data, dict):
        raise TypeError("expected a dictionary, got %r" % type(data))
    return data


def write_config(path, data):
    """Write the dictionary'''


# Greedy decoding of so small a model repeats itself.
TEMP, TOP_P, SEED, MAX_TOKENS = 0.4, 0.95, 3, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", metavar="TEXT", help="Python to continue; - for stdin")
    arguments.add_length(parser, f"{MAX_TOKENS}")
    arguments.add_kv_format(parser)
    arguments.add_threads(parser)
    arguments.add_json(parser)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint.paths import bundled_folder
    from ..engine_options import EngineOptions
    from ..generation.options import Options

    prompt = PROMPT if options.prompt is None else arguments.read_prompt(options.prompt)
    loading = EngineOptions(kv_format=options.kv_format)
    max_tokens = MAX_TOKENS if options.max_tokens is None else options.max_tokens
    how = Options(max_tokens=max_tokens, temp=TEMP, top_p=TOP_P, seed=SEED)
    with open_engine(bundled_folder(), options.threads, loading) as engine, Progress() as progress:
        show = discard if options.json else write
        result = demonstrate(engine, prompt, how, show, progress)
    if options.json:
        print_json(result)
    return 0 if result["ab"]["bit_identical"] else 1


def demonstrate(
    engine: Engine,
    prompt: str,
    how: Options,
    show: Callable[[str], None],
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Continue the prompt on the fused path, then compare both; ``show`` gets the text."""
    from .. import reference_path
    from .ab import compare, format_comparison

    tokens = engine.encode(prompt, raw=True)
    show(f"{ABOUT}\n\n--- prompt, {len(tokens)} tokens\n{prompt}\n--- continuation\n")

    def on_prompt(what: str, done: int, total: int) -> None:
        if what == "prompt":  # the text itself shows how far generation is
            on_progress(what, done, total)

    with reference_path(False):
        completion = engine.generate(tokens, how, show, on_progress=on_prompt)
    comparison = compare(engine.model, tokens, how, on_progress)
    show(f"\n---\n{format_comparison(comparison)}\n")
    kv = {"format": completion.kv_format, "bytes": completion.kv_bytes}
    return {"prompt": prompt, "text": completion.text, "ab": comparison.describe(), "kv": kv}
