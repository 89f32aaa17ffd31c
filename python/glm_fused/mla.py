"""The attention itself, in float32 over cached latents: dense, masked or gathered."""

import mlx.core as mx

from .cache import Span
from .chunks import over_queries
from .matmul import matmul_nt

# A prefill gathers the selected keys once there are this many cached keys for each of them;
# below that, masking inside one large matmul is cheaper.
GATHER_RATIO = 4


def attend(
    q: mx.array,
    latents: mx.array,
    k_pe: mx.array,
    span: Span,
    selection: mx.array | None,
    scale: float,
) -> mx.array:
    """q [b, h, l, r + p] over latents [b, t, r] and k_pe [b, t, p] -> float32 [b, h, l, r].

    Each query attends to its ``selection`` [b, l, k] (to every key without one), as far as
    ``span`` lets it see.
    """
    b, heads, length, width = q.shape
    q = q.swapaxes(1, 2).astype(mx.float32)
    if selection is not None and _gather_pays(length, span.total, selection.shape[-1]):
        batch = mx.arange(b)[:, None, None]

        def part(q: mx.array, lo: int, hi: int) -> mx.array:
            columns = selection[:, lo:hi]
            rows, rows_pe = latents[batch, columns], k_pe[batch, columns]
            return _attend(q, rows, rows_pe, span.allows(columns, lo, hi), scale)

        per_query = selection.shape[-1] * (width + heads) * 4
    else:
        rows, rows_pe = latents[:, None], k_pe[:, None]

        def part(q: mx.array, lo: int, hi: int) -> mx.array:
            return _attend(q, rows, rows_pe, _mask(span, selection, lo, hi), scale)

        per_query = heads * span.total * 4
    return over_queries(part, q, b * per_query).swapaxes(1, 2)


def _gather_pays(length: int, total: int, topk: int) -> bool:
    return length == 1 or total >= GATHER_RATIO * topk


def _mask(span: Span, selection: mx.array | None, lo: int, hi: int) -> mx.array | None:
    """Bool [b or 1, hi - lo, t], or None where nothing is hidden."""
    visible = span.mask(lo, hi)
    if selection is None:
        return visible
    columns = selection[:, lo:hi]
    chosen = mx.zeros((*columns.shape[:2], span.total), mx.bool_)
    chosen = mx.put_along_axis(chosen, columns, mx.array(True), axis=-1)
    return chosen if visible is None else chosen & visible


def _attend(
    q: mx.array, latents: mx.array, k_pe: mx.array, allowed: mx.array | None, scale: float
) -> mx.array:
    """q [b, n, h, r + p]; latents [b, g, t, r] and k_pe [b, g, t, p] with g = n (keys of each
    query) or 1 (the same keys for all); allowed [b or 1, n, t] -> [b, n, h, r]."""
    b, n, heads, _ = q.shape
    groups, rank = latents.shape[1], latents.shape[-1]
    q_latent, q_pe = mx.split(q.reshape(b, groups, -1, q.shape[-1]), [rank], axis=-1)
    scores = (matmul_nt(q_latent, latents) + matmul_nt(q_pe, k_pe)) * scale
    scores = scores.reshape(b, n, heads, -1)
    if allowed is not None:
        # Not -inf: a padding query sees no key, and its NaN would spread through the cache.
        scores = mx.where(allowed[:, :, None], scores, mx.finfo(mx.float32).min)
    weights = mx.softmax(scores, axis=-1).reshape(b, groups, -1, scores.shape[-1])
    return matmul_nt(weights, latents.swapaxes(2, 3)).reshape(b, n, heads, rank)
