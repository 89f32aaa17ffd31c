"""The operations the model is made of.

Each has two paths that agree bit for bit: the fused kernels, and the unfused reference that
`glm_fused.reference_path()` or ``GLM_FUSED_REFERENCE=1`` selects. On a GPU default device the
reference is stock MLX ops; on the CPU it is this package's own, because MLX's quantized matmul
there accumulates in the activation type and runs on one thread.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import mlx.core as mx

from .. import _ext
from . import metal_sim, paths, stock
from .unfit import unfit

Mode = Literal["dense", "affine", "mxfp4", "mxfp8", "nvfp4"]


class Weight(NamedTuple):
    """A weight matrix [..., n, k] as MLX lays it out.

    Attributes:
        weight: float [..., n, k], or uint32 [..., n, k * bits / 32] when quantized.
        scales: one per group of `group_size` columns, [..., n, k / group_size]; float for
            ``affine``, uint8 for the ``mx`` and ``nv`` modes, None for ``dense``.
        biases: like `scales`, for ``affine`` only.
        group_size: columns per scale; 0 for ``dense``.
        bits: bits per value; 0 for ``dense``.
        mode: ``dense``, ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 0
    bits: int = 0
    mode: str = "dense"


def _on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def _on_metal() -> bool:
    """Whether ops with a Metal kernel of their own run it."""
    return metal_sim.active() or (_on_gpu() and mx.metal.is_available())


def _metal_takes(x: mx.array, slots: mx.array) -> bool:
    """Whether moe_decode's kernels take these arrays; if not, says why."""
    if x.ndim != 2 or slots.ndim != 2:
        return True  # what the op rejects with a message
    tokens = x.shape[0]
    if tokens > _ext.metal_max_tokens:
        paths.debug("moe_decode: stock MLX ops, %d tokens are a prompt", tokens)
        return False
    obstacle = _ext.moe_decode_obstacle(tokens, slots.shape[1])
    if obstacle:
        paths.fall_back("moe_decode", obstacle)
    return not obstacle


def quantized_matvec(x: mx.array, w: Weight, *, reference: bool | None = None) -> mx.array:
    """``y[..., m, n] = sum_k x[..., m, k] * W[..., n, k]``, accumulated in fp32.

    Args:
        x: float32, float16 or bfloat16 [..., m, k]; any number of rows. With per-head weights
            [..., h, m, k].
        w: [n, k], or [h, n, k] with one matrix per head.
        reference: True or False overrides the current path.

    Returns:
        [..., m, n] in x's dtype.

    Raises:
        ValueError: a shape, dtype or format does not fit; the message names the argument.
    """
    if _on_gpu():
        return stock_matmul(x, w)
    try:
        return _ext.quantized_matvec(x, w, paths.use_reference(reference))
    except TypeError:
        raise unfit("quantized_matvec", x=x, w=w) from None


def moe_decode(
    x: mx.array,
    gate: Weight,
    up: Weight,
    down: Weight,
    slots: mx.array,
    scores: mx.array,
    *,
    use: _ext.SlotUse | None = None,
    reference: bool | None = None,
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
        reference: True or False overrides the current path.

    Returns:
        [tokens, hidden] in x's dtype.

    Raises:
        ValueError: a shape, dtype or format does not fit, or a slot is out of range; the message
            names the argument. Of slots that are yet to be evaluated, when the result is evaluated
            on the CPU; a GPU cannot raise, and gives NaN.
        RuntimeError: when the result is evaluated, an expert of `use` cannot be read.
    """
    use_reference = paths.use_reference(reference)
    metal = not use_reference and _on_metal() and _metal_takes(x, slots)
    if use is not None and (metal or _on_gpu()):
        slots, use = use.wait(slots), None
    if _on_gpu() and not metal:
        return stock_moe(x, gate, up, down, slots, scores)
    try:
        return _ext.moe_decode(x, gate, up, down, slots, scores, use, use_reference, metal)
    except TypeError:
        raise unfit("moe_decode", gate=gate, up=up, down=down, slots=slots) from None


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

    Returns:
        Experts int32 [tokens, top_k], best first, and their weights float32 [tokens, top_k].

    Raises:
        ValueError: a shape or dtype does not fit, or the counts are impossible.
    """
    use_reference = paths.use_reference(reference)
    metal = not use_reference and _on_metal()
    if metal and weight.ndim == 2:
        obstacle = _ext.router_topk_obstacle(weight.shape[0])
        if obstacle:
            paths.fall_back("router_topk", obstacle)
        metal = not obstacle
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
            use_reference,
            metal,
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


def indexer_topk(
    q: mx.array,
    keys: mx.array,
    weights: mx.array,
    k: int,
    *,
    scale: float,
    start: mx.array | None = None,
    reference: bool | None = None,
) -> mx.array:
    """The cached keys that each query attends to (lightning indexer, DeepSeek-V3.2).

    The queries are the cache's last ``l`` tokens; query ``i`` sees the keys ``start`` to
    ``t - l + i``. Scores are ``sum_h weights[h] * relu(q[h] . key * scale)`` in fp32; the `k` best
    are selected, the lowest index among equals; a NaN ranks with -inf. Holds at most 64 MiB of
    scores at once (one query's, where `t` is beyond 2^24), however many queries there are.

    Args:
        q: float [b, l, heads, dim].
        keys: float [b, t, dim], or packed rows of `glm_fused.formats.kv_rows`.
        weights: float [b, l, heads].
        k: how many keys to select, at least 1.
        start: int32 [b], each sequence's first key that is not padding; None: 0.
        reference: True or False overrides the current path.

    Returns:
        int32 [b, l, k], ascending, then -1 where fewer than `k` keys are visible.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    use_reference = paths.use_reference(reference)
    metal = not use_reference and _on_metal()
    if _on_gpu() and not (metal or use_reference):
        return stock.indexer_topk(q, keys, weights, k, scale, start)
    try:
        return _ext.indexer_topk(q, keys, weights, k, scale, start, use_reference, metal)
    except TypeError:
        raise unfit("indexer_topk", keys=keys, k=k, scale=scale, start=start) from None


def sparse_mla_decode(
    q: mx.array,
    latents: mx.array,
    ropes: mx.array | None = None,
    selected: mx.array | None = None,
    *,
    rank: int,
    scale: float,
    start: mx.array | None = None,
    reference: bool | None = None,
) -> mx.array:
    """Absorbed multi-head latent attention over the selected cached rows (DeepSeek-V2).

    ``softmax(q . row * scale) row[:rank]`` in fp32. The queries are the cache's last ``l`` tokens
    and see what `indexer_topk` lets them see; an entry of `selected` outside that, such as -1, is
    skipped. A query without keys gives zeros. Results depend neither on the number of queries nor
    on threads. Needs, per query and listed key, heads * 4 bytes, for 32 MiB of queries (at least
    one) at a time.

    Args:
        q: float [b, l, heads, rank + rope].
        latents: float [b, t, rank], or packed rows of `glm_fused.formats.kv_rows`, which include
            `ropes`.
        ropes: float [b, t, rope].
        selected: int32 [b, l, k]; None: every visible key.
        start: int32 [b], each sequence's first key that is not padding; None: 0.
        reference: True or False overrides the current path.

    Returns:
        float32 [b, l, heads, rank].

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    use_reference = paths.use_reference(reference)
    metal = not use_reference and _on_metal()
    if metal:
        listed = (latents if selected is None else selected).shape
        obstacle = _ext.sparse_mla_decode_obstacle(listed[1 if selected is None else -1])
        if obstacle:
            paths.fall_back("sparse_mla_decode", obstacle)
        metal = not obstacle
    if _on_gpu() and not (metal or use_reference):
        return stock.sparse_mla_decode(q, latents, ropes, selected, rank, scale, start)
    try:
        return _ext.sparse_mla_decode(
            q, latents, ropes, selected, rank, scale, start, use_reference, metal
        )
    except TypeError:
        raise unfit("sparse_mla_decode", rank=rank, scale=scale, start=start) from None


def stock_matmul(x: mx.array, w: Weight) -> mx.array:
    if w.scales is None:
        return (x @ w.weight.swapaxes(-1, -2)).astype(x.dtype)
    return mx.quantized_matmul(
        x,
        w.weight,
        scales=w.scales,
        biases=w.biases,
        transpose=True,
        group_size=w.group_size,
        bits=w.bits,
        mode=w.mode,
    ).astype(x.dtype)


def stock_gather(x: mx.array, w: Weight, slots: mx.array, sorted_indices: bool = False) -> mx.array:
    if w.scales is None:
        columns = w.weight.swapaxes(-1, -2)
        y = mx.gather_mm(x, columns, rhs_indices=slots, sorted_indices=sorted_indices)
    else:
        y = mx.gather_qmm(
            x,
            w.weight,
            w.scales,
            w.biases,
            rhs_indices=slots,
            transpose=True,
            group_size=w.group_size,
            bits=w.bits,
            mode=w.mode,
            sorted_indices=sorted_indices,
        )
    return y.astype(x.dtype)


def stock_moe(
    x: mx.array, gate: Weight, up: Weight, down: Weight, slots: mx.array, scores: mx.array
) -> mx.array:
    """moe_decode by MLX's own matrix kernels, each step stored in x's dtype."""
    slots = mx.stop_gradient(slots)  # which MLX refuses to differentiate
    rows = x[:, None, None, :]
    act = swiglu(stock_gather(rows, gate, slots), stock_gather(rows, up, slots))
    return expert_sum(stock_gather(act, down, slots).squeeze(-2), scores)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) * up``, every step rounded to the inputs' dtype as moe_decode does.

    Args:
        gate: float32, float16 or bfloat16, of any shape.
        up: of the same shape and dtype.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    return _ext.swiglu(gate, up, _on_metal())


def expert_sum(y: mx.array, scores: mx.array) -> mx.array:
    """``sum_i scores[t, i] * y[t, i]`` in fp32, in order, as moe_decode does.

    Args:
        y: float32, float16 or bfloat16 [tokens, top_k, hidden].
        scores: float [tokens, top_k].

    Returns:
        [tokens, hidden] in y's dtype.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    return _ext.expert_sum(y, scores, _on_metal())
