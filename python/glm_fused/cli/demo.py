"""``glm-fused demo``: the bundled checkpoint continues some Python, on both paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.paths import bundled_folder as checkpoint_folder
from ..generation.generate import OnProgress, generate
from ..generation.options import Options
from ..generation.prompts import encode
from ..models.decoder import Model
from ..ops.paths import reference_path
from .ab import compare, format_comparison

__all__ = ["checkpoint_folder", "run"]

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


def run(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str,
    options: Options,
    write: Callable[[str], None],
    on_progress: OnProgress,
) -> dict[str, Any]:
    """Continue the prompt on the fused path, then compare both; ``write`` gets the text to show."""
    tokens = encode(model, tokenizer, prompt, raw=True)
    write(f"{ABOUT}\n\n--- prompt, {len(tokens)} tokens\n{prompt}\n--- continuation\n")

    def on_prompt(what: str, done: int, total: int) -> None:
        if what == "prompt":  # the text shows how its generation goes on
            on_progress(what, done, total)

    with reference_path(False):
        completion = generate(model, tokenizer, tokens, options, write, on_progress=on_prompt)
    comparison = compare(model, tokens, options, on_progress)
    write(f"\n---\n{format_comparison(comparison)}\n")
    kv = {"format": completion.kv_format, "bytes": completion.kv_bytes}
    return {"prompt": prompt, "text": completion.text, "ab": comparison.describe(), "kv": kv}
