"""Streaming generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, stream_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import _ext, ops, paths
from .host import settle
from .model import Model
from .moe import MoE
from .rows import format_of
from .slots import check_reads


@dataclass(frozen=True)
class Options:
    """How to generate. ``temp`` 0 is greedy; ``seed`` None is another sample every time."""

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def sampler(self) -> Callable[[mx.array], mx.array]:
        return make_sampler(self.temp, self.top_p)


@dataclass(frozen=True)
class Completion:
    """A generated text. ``tokens`` ends with the stop token where ``finish_reason`` is "stop".

    ``kv_bytes`` is what the cache of ``kv_tokens`` tokens has allocated, with room to grow.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    path: str
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float | None
    peak_memory_bytes: int
    kv_format: str
    kv_bytes: int
    kv_tokens: int

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"generation_tokens": len(self.tokens)}


def encode(model: Model, tokenizer: TokenizerWrapper, prompt: str, raw: bool = False) -> list[int]:
    """The prompt's tokens, within the chat template unless ``raw`` or the model has none.

    Raises ValueError for a prompt that is empty, longer than the context, or not text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not valid UTF-8.") from None
    if raw or not tokenizer.has_chat_template:
        tokens = tokenizer.encode(prompt)
    else:
        message = {"role": "user", "content": prompt}
        render = cast(Callable[..., list[int]], tokenizer.apply_chat_template)
        tokens = render([message], add_generation_prompt=True)
    limit = model.args.max_position_embeddings
    if not 0 < len(tokens) < limit:
        raise ValueError(f"the prompt is {len(tokens)} tokens, expected 1 to {limit - 1}.")
    if max(tokens) >= model.args.vocab_size:
        raise ValueError(
            f"the tokenizer gave token {max(tokens)}, but the model's vocabulary has"
            f" {model.args.vocab_size}: they do not belong together."
        )
    return list(tokens)


@contextmanager
def settled() -> Iterator[None]:
    """Within the block mlx-lm generates; at its end, wait for what was evaluated ahead.

    That is a step which nobody asks for: what fails in it concerns no later generation.
    """
    try:
        yield
    finally:
        settle(generation_stream)


@settled()
def generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: Sequence[int],
    options: Options,
    on_text: Callable[[str], None] = lambda text: None,
) -> Completion:
    """Generate on the current path; ``on_text`` gets each piece of text as it is ready."""
    debug_paths(model)
    if options.seed is not None:
        mx.random.seed(options.seed)
    mx.reset_peak_memory()
    text, tokens, ticks, response = "", [], [], None
    kv = model.make_cache()
    for response in stream_generate(
        model,
        tokenizer,
        list(prompt),
        options.max_tokens,
        sampler=options.sampler(),
        prompt_cache=kv,
    ):
        check_reads(kv)
        ticks.append(time.perf_counter())
        tokens.append(int(response.token))
        text += response.text
        on_text(response.text)
    assert response is not None  # even a stop token at once gives one
    return Completion(
        text=text,
        tokens=tokens,
        finish_reason=response.finish_reason or "length",
        path="reference" if paths.use_reference() else "fused",
        prompt_tokens=len(prompt),
        prompt_tps=response.prompt_tps,
        generation_tps=ratio(len(ticks) - 1, ticks[-1] - ticks[0]),
        peak_memory_bytes=mx.get_peak_memory(),
        kv_format=format_of(kv[0][0].keys.dtype),
        kv_bytes=sum(layer.nbytes for layer in kv),
        kv_tokens=kv[0].size(),
    )


def debug_paths(model: Model) -> None:
    """With ``GLM_FUSED_DEBUG``, say which path each layer takes and why."""
    if not paths.flag("GLM_FUSED_DEBUG"):
        return
    if mx.default_device() == mx.gpu:
        path = "stock MLX ops (the default device is a GPU)"
    elif paths.use_reference():
        path = "reference (asked for)"
    else:
        path = f"fused ({_ext.cpu_kernels()}, {_ext.num_threads()} threads)"
    for i, layer in enumerate(model.layers):
        indexer = "full" if "indexer" in layer.self_attn else "shared"
        mlp = layer.mlp.switch_mlp if isinstance(layer.mlp, MoE) else layer.mlp
        formats = "/".join(_format(weight) for weight in mlp.weights())
        kind = "moe_decode" if isinstance(layer.mlp, MoE) else "dense mlp"
        paths.debug("layer %d: %s indexer, %s %s: %s", i, indexer, kind, formats, path)


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, None where either is missing or 0."""
    return a / b if a and b else None


def _format(weight: ops.Weight) -> str:
    return f"{weight.mode}{weight.bits}" if weight.mode == "affine" else weight.mode
