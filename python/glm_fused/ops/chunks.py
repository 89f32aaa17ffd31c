"""Query chunks that keep a prefill's temporaries within a budget."""

from collections.abc import Callable

import mlx.core as mx

BUDGET_BYTES = 128 << 20  # scores take so much; temporaries around them about four times that


def over_queries(
    part: Callable[[mx.array, int, int], mx.array], queries: mx.array, bytes_per_query: int
) -> mx.array:
    """Concatenate ``part(queries[:, lo:hi], lo, hi)`` over chunks of ``queries`` [b, l, …].

    A chunk's scores, at ``bytes_per_query``, stay within `BUDGET_BYTES`; it has at least one query.
    """
    length = queries.shape[1]
    step = max(1, BUDGET_BYTES // max(bytes_per_query, 1))
    if step >= length:
        return part(queries, 0, length)
    parts: list[mx.array] = []
    for lo in range(0, length, step):
        hi = min(lo + step, length)
        chunk = queries[:, lo:hi]
        # Each chunk waits for the last: else the scheduler may hold the temporaries of several.
        if parts:
            chunk = mx.depends(chunk, parts[-1])
        parts.append(part(chunk, lo, hi))
    return mx.concatenate(parts, axis=1)
