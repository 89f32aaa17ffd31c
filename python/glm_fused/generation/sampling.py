"""mlx-lm's sampler, made to behave as its limits where a temperature or a nucleus is extreme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

Sampler = Callable[[mx.array], mx.array]

USUAL_TEMPERATURES = (1e-3, 1e3)
# 1 / temp and what it multiplies stay finite in float32, and top_p * mass stays above 0.
_LEAST, _MOST = 1e-30, 1e30


def sampler(temp: float, top_p: float = 1.0, **others: Any) -> Sampler:
    """A function that takes log-probabilities [..., vocabulary] and returns tokens [...].

    ``others`` are further arguments of mlx-lm's ``make_sampler``. At usual temperatures the
    arithmetic is mlx-lm's to the bit. Beyond them its ``logits * (1 / temp)`` leaves the range of
    float16 or float32, and what is left of it gives noise. So there the best token's
    log-probability is taken as 0, in float32, and it stays the best. A ``top_p`` however small
    keeps the best token.
    """
    top_p = max(top_p, _LEAST) if top_p > 0 else top_p
    within = make_sampler(min(max(temp, _LEAST), _MOST) if temp else 0, top_p, **others)
    low, high = USUAL_TEMPERATURES
    if temp == 0 or low <= temp <= high:
        return within

    def extreme(logprobs: mx.array) -> mx.array:
        best = logprobs.max(axis=-1, keepdims=True)
        return within((logprobs - best).astype(mx.float32))

    return extreme
