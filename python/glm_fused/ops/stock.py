"""The ops as chains of stock MLX ones: what a GPU runs for want of better, and a yardstick."""

from typing import Any

import mlx.core as mx

from ..formats import kv_rows
from ..formats.weights import Format, Weight, dequantize
from .chunks import over_queries
from .steps import expert_sum, swiglu
from .topk import topk_indices


def takes(*weights: Weight) -> bool:
    """Whether MLX has matrix kernels for the formats; of what ops refuse, any answer does."""
    formats = (w.format for w in weights if isinstance(w, Weight))
    return all(fmt.mode for fmt in formats if isinstance(fmt, Format))


def quantized_matvec(x: mx.array, w: Weight) -> mx.array:
    """`glm_fused.ops.quantized_matvec` by MLX's own matrix kernels."""
    weight = w.planes[0]
    if w.format.mode == "dense":
        return (x @ weight.swapaxes(-1, -2)).astype(x.dtype)
    if not takes(w):
        return x @ dequantize(w, x.dtype).swapaxes(-1, -2)
    if w.factor is None:
        return mx.quantized_matmul(x, weight, transpose=True, **w.quantization).astype(x.dtype)
    y = mx.quantized_matmul(x.astype(mx.float32), weight, transpose=True, **w.quantization)
    return (y * w.factor[..., None, None]).astype(x.dtype)


def append_rows(buffer: mx.array, rows: mx.array, at: int) -> mx.array:
    """`glm_fused.ops.append_rows` by MLX's own ops, which copy a buffer that others hold."""
    end = at + rows.shape[2]
    buffer[..., at:end, :] = rows
    return buffer[:, 0, :end]


def append_packed(buffer: mx.array, values: mx.array, ropes: mx.array | None, at: int) -> mx.array:
    """`glm_fused.ops.append_packed` by MLX's own ops."""
    rows = kv_rows.pack(values, ropes, kv_rows.format_of(buffer.dtype))
    return append_rows(buffer, rows, at)


def gather(x: mx.array, w: Weight, slots: mx.array, sorted_indices: bool = False) -> mx.array:
    """``x W^T`` for the matrix that each slot names, in x's dtype."""
    how: dict[str, Any] = {"rhs_indices": slots, "sorted_indices": sorted_indices}
    weight = w.planes[0]
    if w.format.mode == "dense":
        return mx.gather_mm(x, weight.swapaxes(-1, -2), **how).astype(x.dtype)
    if not takes(w):
        return mx.gather_mm(x, dequantize(w, x.dtype).swapaxes(-1, -2), **how)
    if w.factor is None:
        return mx.gather_qmm(x, weight, transpose=True, **how, **w.quantization).astype(x.dtype)
    y = mx.gather_qmm(x.astype(mx.float32), weight, transpose=True, **how, **w.quantization)
    return (y * w.factor[slots][..., None, None]).astype(x.dtype)


def expert_matvec(x: mx.array, w: Weight, slots: mx.array) -> mx.array:
    """`glm_fused.ops.expert_matvec` by MLX's own matrix kernels."""
    rows = x[:, None, None] if x.ndim == 2 else x[:, :, None]
    return gather(rows, w, mx.stop_gradient(slots)).squeeze(-2)


def moe_decode(
    x: mx.array, gate: Weight, up: Weight, down: Weight, slots: mx.array, scores: mx.array
) -> mx.array:
    """`glm_fused.ops.moe_decode` by MLX's own matrix kernels, each step stored in x's dtype."""
    slots = mx.stop_gradient(slots)  # which MLX refuses to differentiate
    rows = x[:, None, None, :]
    act = swiglu(gather(rows, gate, slots), gather(rows, up, slots))
    return expert_sum(gather(act, down, slots).squeeze(-2), scores)


def indexer_topk(
    q: mx.array,
    keys: mx.array,
    weights: mx.array,
    k: int,
    scale: float,
    start: mx.array | None = None,
) -> mx.array:
    """`glm_fused.ops.indexer_topk`; its scores are rounded as MLX's matmul rounds them."""
    b, length, heads, dim = q.shape
    total = keys.shape[1]
    if keys.dtype in kv_rows.PACKED.values():
        keys, _ = kv_rows.unpack(keys, dim)
    keys = keys.astype(mx.float32).swapaxes(1, 2)
    weights = weights.astype(mx.float32)

    def part(q: mx.array, lo: int, hi: int) -> mx.array:
        n = hi - lo
        scores = (q.astype(mx.float32).reshape(b, n * heads, dim) @ keys) * scale
        scores = mx.maximum(scores, 0).reshape(b, n, heads, total)
        scores = (weights[:, lo:hi, None] @ scores)[:, :, 0]
        visible = visible_columns(mx.arange(total)[None, None], length, total, lo, hi, start)
        scores = mx.where(visible, scores, -mx.inf)
        chosen = topk_indices(scores, min(k, total))
        chosen = mx.where(mx.take_along_axis(visible, chosen, axis=-1), chosen, total)
        chosen = mx.sort(chosen, axis=-1)
        chosen = mx.where(chosen < total, chosen, -1)
        return mx.pad(chosen, [(0, 0), (0, 0), (0, max(k - total, 0))], constant_values=-1)

    return over_queries(part, q, b * heads * total * 4)


def sparse_mla_decode(
    q: mx.array,
    latents: mx.array,
    ropes: mx.array | None,
    selected: mx.array | None,
    rank: int,
    scale: float,
    start: mx.array | None = None,
) -> mx.array:
    """`glm_fused.ops.sparse_mla_decode`, unfused: gather the rows, then two matmuls."""
    b, length, heads, width = q.shape
    total = latents.shape[1]
    if latents.dtype in kv_rows.PACKED.values():
        latents, ropes = kv_rows.unpack(latents, rank)
    if ropes is not None:
        latents = mx.concatenate([latents, ropes.astype(latents.dtype)], axis=-1)
    batch = mx.arange(b)[:, None, None]

    def part(q: mx.array, lo: int, hi: int) -> mx.array:
        columns = mx.arange(total)[None, None] if selected is None else selected[:, lo:hi]
        visible = visible_columns(columns, length, total, lo, hi, start)
        chosen = latents[:, None] if selected is None else latents[batch, columns % total]
        chosen = chosen.astype(mx.float32)
        scores = (q.astype(mx.float32) @ chosen.swapaxes(2, 3)) * scale
        scores = mx.where(visible[:, :, None], scores, mx.finfo(mx.float32).min)
        weights = mx.softmax(scores, axis=-1)
        out = weights @ chosen[..., :rank]
        return mx.where(visible.any(axis=-1)[..., None, None], out, 0.0)

    listed = total if selected is None else selected.shape[-1]
    return over_queries(part, q, b * listed * (heads + (0 if selected is None else width)) * 4)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """`glm_fused.ops.rms_norm`, in MLX's order."""
    return mx.fast.rms_norm(x, weight, eps).astype(x.dtype)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """`glm_fused.ops.layer_norm`, in MLX's order."""
    return mx.fast.layer_norm(x, weight, bias, eps).astype(x.dtype)


def rotate(x: mx.array, cos: mx.array, sin: mx.array, interleaved: bool) -> mx.array:
    """`glm_fused.ops.rotate`, one op a step."""
    width = 2 * cos.shape[-1]
    head = x[..., :width].astype(mx.float32)
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
    else:
        a, b = mx.split(head, 2, axis=-1)
    pair = [a * cos - b * sin, b * cos + a * sin]
    if interleaved:
        head = mx.stack(pair, axis=-1).reshape(head.shape)
    else:
        head = mx.concatenate(pair, axis=-1)
    head = head.astype(x.dtype)
    return head if width == x.shape[-1] else mx.concatenate([head, x[..., width:]], axis=-1)


def visible_columns(
    columns: mx.array, length: int, total: int, lo: int, hi: int, start: mx.array | None
) -> mx.array:
    """Whether queries lo..hi - 1 of ``length`` see ``columns``: causal, not before ``start``."""
    first = total - length
    queries = mx.arange(first + lo, first + hi)[None, :, None]
    seen = (columns <= queries) & (columns >= 0)
    return seen if start is None else seen & (columns >= start[:, None, None])
