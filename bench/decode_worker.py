"""Decodes for bench_decode.py, which starts it once for each installation of glm_fused.

A burst begins where the prompt ended, greedily, one evaluation a token. For bench_prompt.py it is a
prompt of its own instead. Only names that versions of glm_fused share are used here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import glm52_slice
import mlx.core as mx
import mlx_lm
import numpy as np
from bursts import serve
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

import glm_fused


class Subject(NamedTuple):
    """A model: its step, from tokens [1, n] and a cache to logits [1, n, vocabulary]."""

    model: Any
    step: Callable[[mx.array, Any], mx.array]


def checkpoint(path: str) -> Subject:
    """The model in a folder; "demo" is the bundled one."""
    model, _ = glm_fused.load(path)
    return Subject(model, model)


def stock(path: str) -> Subject:
    """The model in a folder as mlx-lm has it, without glm_fused."""
    model, _ = mlx_lm.load(path)[:2]
    return Subject(model, model)


def true_shapes(options: argparse.Namespace) -> Subject:
    """Layers of GLM-5.2's shapes, of random weights."""
    dtype = mx.float32 if options.fp32 else mx.bfloat16
    model = glm52_slice.model(glm52_slice.chosen(options), options.weights, dtype)
    return Subject(model, model)


def bytes_per_token(model: Any) -> int:
    """The bytes of weights that a decoded token reads."""
    args, total = model.args, 0.0
    for name, array in tree_flatten(model.parameters()):
        share = 1.0
        if ".switch_mlp." in name:
            share = args.num_experts_per_tok / array.shape[0]
        elif name.startswith("model.embed_tokens."):
            share = 1 / args.vocab_size
        total += share * array.nbytes
    return round(total)


def run_seconds() -> float:
    """How long recorded steps have run; versions before 0.2 record none."""
    step = getattr(glm_fused._ext, "DecodeStep", None)
    return step.run_seconds() if hasattr(step, "run_seconds") else 0.0


class Decoding:
    """A cache with a prompt in it, from whose end bursts decode."""

    def __init__(self, subject: Subject, prompt: int) -> None:
        self.step, self.cache = subject.step, make_prompt_cache(subject.model)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, subject.model.args.vocab_size, (1, prompt), np.int32)
        start = time.perf_counter()
        self.first = mx.argmax(self.step(mx.array(tokens), self.cache)[:, -1:], axis=-1)
        mx.eval(self.first)
        self.prompt_seconds = time.perf_counter() - start

    def burst(self, threads: int, tokens: int) -> dict[str, float]:
        """Decode so many tokens, then take them out of the cache again.

        As generation does, a token's graph is built and enqueued while the one before is computed.
        Returns the seconds in which Python built graphs, and those of recorded steps, if there were
        any.
        """
        glm_fused.set_num_threads(threads)
        token, graph, before = self.first, 0.0, run_seconds()
        for _ in range(tokens):
            start, last = time.perf_counter(), token
            token = mx.argmax(self.step(last, self.cache)[:, -1:], axis=-1)
            graph += time.perf_counter() - start
            mx.async_eval(token)
            mx.eval(last)
        mx.eval(token)
        trim_prompt_cache(self.cache, tokens)
        ran = run_seconds() - before
        return {"graph_seconds": graph} | ({"kernel_seconds": ran} if ran else {})


class Prompts:
    """Prompts, each into a cache of its own, in the chunks that mlx-lm's generation takes."""

    CHUNK = 2048

    def __init__(self, subject: Subject) -> None:
        self.subject, self.rng = subject, np.random.default_rng(0)

    def burst(self, threads: int, tokens: int) -> dict[str, float]:
        """Process a prompt of so many random tokens, up to the logits of its last one."""
        glm_fused.set_num_threads(threads)
        model, step = self.subject
        cache = make_prompt_cache(model)
        prompt = mx.array(self.rng.integers(0, model.args.vocab_size, (1, tokens), np.int32))
        for first in range(0, tokens - 1, self.CHUNK):
            step(prompt[:, first : min(first + self.CHUNK, tokens - 1)], cache)
            mx.eval([layer.state for layer in cache])
        mx.eval(step(prompt[:, -1:], cache))
        return {}


def write_logits(subject: Subject, tokens: Path, logits: Path) -> None:
    """Write float32 logits [n, vocabulary] of a prompt of int32 tokens [n]; both files are raw."""
    from glm_fused.host import to_numpy  # versions before 0.1 lack it

    prompt = mx.array(np.fromfile(tokens, np.int32))[None]
    found = subject.step(prompt, make_prompt_cache(subject.model))[0].astype(mx.float32)
    to_numpy(found).tofile(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--slice", action="store_true")
    glm52_slice.add_options(parser)
    parser.add_argument("--weights", choices=glm52_slice.FORMATS, default="affine4")
    parser.add_argument("--fp32", action="store_true", help="the slice's activations, not bf16")
    parser.add_argument("--prompt", type=int, default=86)
    parser.add_argument("--prompts", action="store_true", help="a burst is a prompt")
    files = {"type": Path, "nargs": 2, "metavar": ("TOKENS", "LOGITS")}
    parser.add_argument("--logits", **files, help="write the logits of tokens, and end")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if options.slice:
        subject = true_shapes(options)
    else:
        subject = (stock if options.stock else checkpoint)(options.model)
    if options.logits:
        write_logits(subject, *options.logits)
        return
    loaded = {
        "glm_fused": glm_fused.__version__,
        "bytes_per_token": bytes_per_token(subject.model),
    }
    if options.prompts:
        serve(loaded, Prompts(subject).burst)
        return
    decoding = Decoding(subject, options.prompt)
    serve(loaded | {"prompt_seconds": decoding.prompt_seconds}, decoding.burst)


if __name__ == "__main__":
    main()
