"""Mixture of experts: which ones, and what they give."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from ..formats.weights import Weight
from . import routes, stock
from .routes import Kernel, Stream
from .unfit import unfit


def moe_decode(
    x: mx.array,
    gate: Weight,
    up: Weight,
    down: Weight,
    slots: mx.array,
    scores: mx.array,
    *,
    use: _ext.SlotUse | None = None,
    prompt: bool | None = None,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """The routed experts of one MoE layer, ``sum_i scores[t, i] * E[slots[t, i]](x[t])``.

    An expert is ``E(x) = down(silu(gate(x)) * up(x))`` (SwiGLU, https://arxiv.org/abs/2002.05202).
    Intermediate values are rounded to x's dtype exactly where the chain of MLX ops stores them.

    Args:
        x: float32, float16 or bfloat16 [tokens, hidden].
        gate: [slots, intermediate, hidden]; `gate`, `up` and `down` may differ in format.
        up: [slots, intermediate, hidden].
        down: [slots, hidden, intermediate].
        slots: int32 or uint32 [tokens, top_k], each in [0, slots); repeats are allowed.
        scores: float [tokens, top_k].
        use: of the bank whose arrays `gate`, `up` and `down` are, where `slots` are those that it
            resolved and may still be read into. The CPU computes each expert once it is read;
            other paths wait for all.
        prompt: whether the tokens are a prompt's, which Metal groups by slot to read each
            expert's weights once for up to 128 of its tokens; its matrix units have their own
            order of sums. None: if there are more than 16.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        [tokens, hidden] in x's dtype.

    Raises:
        ValueError: a shape, dtype or format does not fit, or a slot is out of range; the message
            names the argument. Of slots that are yet to be evaluated, when the result is evaluated
            on the CPU; a GPU cannot raise, and gives NaN.
        RuntimeError: when the result is evaluated, an expert of `use` cannot be read.
    """
    tokens, top_k = _rows(x), _columns(slots)
    kernel = routes.take(
        "moe_decode",
        tokens,
        top_k,
        stream=stream,
        reference=reference,
        stock_ops=stock.takes(gate, up, down),
        prompt=prompt,
    )
    if use is not None and kernel in (Kernel.metal, Kernel.metal_prompt, Kernel.mlx):
        slots, use = use.wait(slots), None
    if kernel is Kernel.mlx:
        with routes.on(stream):
            return stock.moe_decode(x, gate, up, down, slots, scores)
    try:
        return _ext.moe_decode(x, gate, up, down, slots, scores, use, kernel, stream)
    except TypeError:
        raise unfit("moe_decode", gate=gate, up=up, down=down, slots=slots) from None


def expert_matvec(
    x: mx.array,
    w: Weight,
    slots: mx.array,
    *,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """``y[t, i] = W[slots[t, i]] x[t]``, one projection of `moe_decode` and rounded as there.

    With `swiglu` and `expert_sum` it makes the chain of `moe_decode`, for experts whose rows are
    not all here. It has no gradient on a CPU.

    Args:
        x: float32, float16 or bfloat16 [tokens, k], or [tokens, top_k, k] with a vector for each
            choice.
        w: [slots, n, k].
        slots: int32 or uint32 [tokens, top_k], each in [0, slots); repeats are allowed.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        [tokens, top_k, n] in x's dtype.

    Raises:
        ValueError: a shape, dtype or format does not fit, or a slot is out of range, as for
            `moe_decode`.
    """
    kernel = routes.take(
        "expert_matvec", stream=stream, reference=reference, stock_ops=stock.takes(w)
    )
    if kernel is Kernel.mlx:
        with routes.on(stream):
            return stock.expert_matvec(x, w, slots)
    try:
        return _ext.expert_matvec(x, w, slots, kernel, stream)
    except TypeError:
        raise unfit("expert_matvec", x=x, w=w, slots=slots) from None


def router_topk(
    x: mx.array,
    weight: mx.array,
    correction_bias: mx.array,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
    reference: bool | None = None,
    stream: Stream = None,
) -> tuple[mx.array, mx.array]:
    """Choose each token's experts (DeepSeek-V3's ``noaux_tc``, https://arxiv.org/abs/2412.19437).

    ``s = sigmoid(W x)`` in fp32; the best `topk_group` of `n_group` groups by their two best
    ``s + correction_bias``; the best `top_k` experts in them, lowest index first among equals.
    The weights are the unbiased ``s``, normalised if `norm_topk_prob`, times
    `routed_scaling_factor`.

    Args:
        x: float [tokens, hidden].
        weight: float [experts, hidden].
        correction_bias: float [experts].
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        Experts int32 [tokens, top_k], best first, and their weights float32 [tokens, top_k].

    Raises:
        ValueError: a shape or dtype does not fit, or the counts are impossible.
    """
    kernel = routes.take("router_topk", _rows(weight), stream=stream, reference=reference)
    try:
        return _ext.router_topk(
            x,
            weight,
            correction_bias,
            top_k,
            n_group,
            topk_group,
            norm_topk_prob,
            routed_scaling_factor,
            kernel,
            stream,
        )
    except TypeError:
        raise unfit(
            "router_topk",
            top_k=top_k,
            n_group=n_group,
            topk_group=topk_group,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
        ) from None


def _rows(a: mx.array) -> int:
    """Of a matrix; of what the op refuses, with a message, any number does."""
    return a.shape[0] if a.ndim == 2 else 1


def _columns(a: mx.array) -> int:
    return a.shape[1] if a.ndim == 2 else 1
