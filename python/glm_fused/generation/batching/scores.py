"""Log-probabilities of tokens, and the likeliest tokens in their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

Score = tuple[float, tuple[tuple[int, float], ...]]


def scores(logits: mx.array, tokens: Sequence[int], count: int) -> list[Score]:
    """Of each row of logits [n, vocabulary] the log-probability of its token, and the ``count``
    likeliest tokens with theirs, the likeliest first."""
    logits = logits.astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    most = min(count, found.shape[-1] - 1)
    likeliest = mx.argpartition(-found, most, axis=-1)[:, :count]
    own = mx.take_along_axis(found, mx.array(list(tokens))[:, None], axis=-1)
    values = mx.take_along_axis(found, likeliest, axis=-1)
    listed = cast(tuple[list[list[int]], list[list[float]]], (likeliest.tolist(), values.tolist()))
    tops = [
        tuple(sorted(zip(*pair, strict=True), key=lambda one: (-one[1], one[0])))
        for pair in zip(*listed, strict=True)
    ]
    return list(zip(cast(list[float], own[:, 0].tolist()), tops, strict=True))
