"""Decodes for bench_decode.py, which starts it once for each installation of glm_fused.

A burst begins where the prompt ended, greedily, one evaluation a token. For bench_prompt.py it is a
prompt of its own instead. Only names that versions of glm_fused share are used here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm
import numpy as np
from bursts import serve
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

import glm_fused

# A dense layer that is full and three sparse ones that share its selection: most of GLM-5.2.
SLICE = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "shared", "shared"]}


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


def random_weight(bits: Any, shape: tuple[int, ...]) -> Any:
    """affine4 values around 0; else tokens would hardly differ, and take the same experts."""
    from glm_fused.formats.weights import FORMATS, Weight  # versions before 0.1 lack them

    codes, scales, _ = bits.weight(shape, FORMATS["affine4"], mx.bfloat16).planes
    return Weight((codes, scales, -7.5 * scales), FORMATS["affine4"])


def glm52_slice(experts: int) -> Subject:
    """Layers of GLM-5.2's shapes, of ``experts`` experts; affine4 but for router and indexer."""
    from glm_fused.models.config import args_from_config
    from glm_fused.models.decoder import Model
    from glm_fused.selftest.synthetic import Bits

    config = json.loads(Path(__file__).with_name("glm52_slice.json").read_text())
    model = Model(args_from_config(config | SLICE | {"n_routed_experts": experts}))
    model.set_dtype(mx.bfloat16)
    bits, quantizes = Bits(0), model.quant_predicate
    packed = [
        (path, module.packed_class(random_weight(bits, module.weight.shape), module))
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized") and quantizes(path, module)
    ]
    model.update_modules(tree_unflatten(packed))
    for layer in model.layers:  # zeros would make every token choose the same experts
        if hasattr(layer.mlp, "gate"):
            weight = mx.random.normal(layer.mlp.gate.weight.shape) * config["hidden_size"] ** -0.5
            layer.mlp.gate.weight = weight.astype(mx.bfloat16)
    model.eval()
    mx.eval(model.parameters())
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--slice", action="store_true")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=86)
    parser.add_argument("--prompts", action="store_true", help="a burst is a prompt")
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if options.slice:
        subject = glm52_slice(options.experts)
    else:
        subject = (stock if options.stock else checkpoint)(options.model)
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
