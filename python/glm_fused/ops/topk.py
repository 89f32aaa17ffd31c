"""Exact top-k with one answer: among equal scores the lowest index wins, on every backend."""

import mlx.core as mx


def topk_indices(scores: mx.array, k: int) -> mx.array:
    """The indices of the ``k`` largest ``scores`` float [..., t], ascending: int32 [..., k].

    It needs only the k-th value, not a sort order, so it does not rely on a stable sort. A NaN is
    never selected before a number; -inf is selected only when nothing else is left. Raises
    ValueError unless 1 <= k <= t.
    """
    t = scores.shape[-1]
    if not 0 < k <= t:
        raise ValueError(f"[topk_indices] k must be from 1 to {t} (the number of keys), got {k}.")
    scores = mx.where(mx.isnan(scores), -mx.inf, scores)
    kth = mx.partition(scores, t - k, axis=-1)[..., t - k : t - k + 1]
    above, equal = scores > kth, scores == kth
    spare = k - above.sum(axis=-1, keepdims=True)
    chosen = above | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= spare))
    rank = mx.cumsum(chosen.astype(mx.int32), axis=-1) - 1
    slots = mx.where(chosen, rank, k)  # what is not chosen goes to slot k, which is cut off
    columns = mx.broadcast_to(mx.arange(t, dtype=mx.int32), slots.shape)
    out = mx.zeros((*slots.shape[:-1], k + 1), mx.int32)
    return mx.put_along_axis(out, slots, columns, axis=-1)[..., :k]
