"""Compiles a model's Metal kernels before they are needed.

A GPU's kernels are compiled at run time, which would make the first token wait, and every token
after it that is the first of its kind. So the model's layers are run once for each kind of step, on
arrays that nothing evaluates, and what the evaluation would launch is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from .. import _ext, ops
from ..ops.routes import Kernel, choose
from .cache import Span, append, empty_cache
from .decoder import Model
from .layer import DecoderLayer
from .layers import MLP
from .mtp import MtpLayer
from .rope import Angles

OnCompile = Callable[[int, int], None]


def unseen(done: int, total: int) -> None:
    """An `OnCompile` for nobody."""


# Kernels differ by the power of two that holds a step's tokens; one more is a prompt's.
_TOKENS = (1, 2, 4, 8, ops.blocks.MAX_TOKENS, ops.blocks.MAX_TOKENS + 1)
_GROWS = 256  # a cache with a multiple of so many tokens grows for the next one
_SPREAD = 1 << 15  # of more keys, several threadgroups select


def compile_kernels(model: Model, on_compile: OnCompile = unseen) -> int:
    """Compile the kernels of the model's decode steps and prompts; how many there were to compile.

    Does nothing where ops take no Metal kernels. Weights may be read later: nothing is evaluated.

    Args:
        model: on the current device; its caches will have its ``kv_format``.
        on_compile: called with how many kernels are compiled, from 0 on, and of how many.

    Raises:
        RuntimeError: a shader does not compile.
    """
    if choose("rms_norm").kernel is not Kernel.metal:
        return 0
    outputs = [array for sizes in _kinds(model) for array in _step(model, *sizes)]
    return _ext.compile_kernels(outputs, on_compile)


def _kinds(model: Model) -> Iterator[tuple[int, int]]:
    """How many tokens are cached, and how many are new, in one step of each kind."""
    some = -(-model.args.index_topk // _GROWS) * _GROWS  # more than are selected
    for tokens in _TOKENS:
        yield from ((0, tokens), (some, tokens))
    yield from ((cached, 1) for cached in (_SPREAD, model.context - 1) if cached >= _SPREAD)


def _step(model: Model, cached: int, tokens: int) -> list[mx.array]:
    """The arrays that a step makes, unevaluated."""
    args, decoder = model.args, model.model
    x = decoder.embed_tokens(mx.zeros((1, tokens), mx.int32))
    angles = Angles(*[mx.zeros((1, 1, tokens, args.qk_rope_head_dim // 2))] * 2)
    cache = _cache(model, cached, x.dtype)
    span, selection, outputs = Span(cached, tokens), None, []
    for layer, entry in zip(decoder.own_layers, cache, strict=True):
        if isinstance(layer, MtpLayer):
            outputs.append(model.head(hidden := decoder.norm(x)))
            x = layer.join(x, hidden)
        selection = None if "indexer" in layer.self_attn else selection
        x, selection = layer.self_attn(x, layer.input_layernorm, span, angles, entry, selection)
        outputs += [array for rows in entry.caches for array in (rows.keys, rows.values)]
        made = _mlp(layer, x)
        x = made[0]
        outputs += made
    norm = decoder.mtp.shared_head.norm if model.args.has_mtp else decoder.norm
    return [*outputs, model.head(norm(x))]


def _cache(model: Model, cached: int, dtype: mx.Dtype) -> Sequence[Any]:
    """The caches of ``cached`` tokens, unevaluated."""
    args, cache = model.args, [empty_cache(layer) for layer in model.args.model_layers]
    widths = (args.kv_lora_rank, args.qk_rope_head_dim), (args.index_head_dim, None)
    for layer in cache if cached else []:
        for entry, (rank, rope) in zip(layer.caches, widths, strict=False):
            rows = mx.zeros((1, 1, cached, rank), dtype)
            ropes = None if rope is None else mx.zeros((1, 1, cached, rope), dtype)
            append(entry, rows, ropes, model.kv_format)
    return cache


def _mlp(layer: DecoderLayer, x: mx.array) -> list[mx.array]:
    """The second half of a layer of x [b, l, hidden], and what else it makes."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    if isinstance(mlp, MLP) or mlp.switch_mlp.takes_at_once(mlp.gate.choices(x)):
        return [mlp(x, norm)]
    # Its experts would be awaited, and computed a few tokens at a time.
    flat = norm(x).reshape(-1, x.shape[-1])
    experts, scores = mlp.gate(flat)
    y = ops.expert_sum(mx.zeros((*experts.shape, x.shape[-1]), x.dtype), scores)
    made = [x + y.reshape(x.shape)]
    if "shared_experts" in mlp:
        made.append(mlp.shared_experts.feed_forward(flat))
    gate, up, down = mlp.switch_mlp.weights()
    assert gate is not None and up is not None and down is not None  # no adapter waits
    prompt = flat.shape[0] > ops.blocks.MAX_TOKENS
    for few in (flat[:1], flat):
        slots = mx.zeros((few.shape[0], 1), mx.int32)
        ones = mx.ones(slots.shape)
        made.append(ops.moe_decode(few, gate, up, down, slots, ones, prompt=prompt))
    return made
