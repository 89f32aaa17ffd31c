"""The long-context ops in stock MLX: what a GPU default device runs, and a yardstick."""

import mlx.core as mx

from ..formats import kv_rows
from .chunks import over_queries
from .topk import topk_indices


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


def visible_columns(
    columns: mx.array, length: int, total: int, lo: int, hi: int, start: mx.array | None
) -> mx.array:
    """Whether queries lo..hi - 1 of ``length`` see ``columns``: causal, not before ``start``."""
    first = total - length
    queries = mx.arange(first + lo, first + hi)[None, :, None]
    seen = (columns <= queries) & (columns >= 0)
    return seen if start is None else seen & (columns >= start[:, None, None])
