"""mlx-lm's sampling, made to behave as its limits where a temperature or a nucleus is extreme."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_k, apply_top_p

Shaper = Callable[[mx.array], mx.array]

USUAL_TEMPERATURES = (1e-3, 1e3)
# 1 / temp and what it multiplies stay finite in float32, and top_p * mass stays above 0.
_LEAST, _MOST = 1e-30, 1e30


def shaper(temp: float, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0) -> Shaper:
    """A function that takes log-probabilities [..., vocabulary] to the logits that are drawn from.

    At usual temperatures, which are above 0, the arithmetic is that of mlx-lm's ``make_sampler`` to
    the bit. Beyond them its ``logits * (1 / temp)`` leaves the range of float16 or float32, and
    what is left of it gives noise. So there the best token's log-probability is taken as 0, in
    float32, and it stays the best. A ``top_p`` however small keeps the best token.
    """
    low, high = USUAL_TEMPERATURES
    usual, scale = low <= temp <= high, 1.0 / min(max(temp, _LEAST), _MOST)

    def shape(logprobs: mx.array) -> mx.array:
        if not usual:
            best = logprobs.max(axis=-1, keepdims=True)
            logprobs = (logprobs - best).astype(mx.float32)
        if 0 < top_p < 1:
            # MLX compiles a function anew for every number, but not for what is in an array.
            nucleus: Any = mx.array(max(top_p, _LEAST))
            logprobs = apply_top_p(logprobs, nucleus)
        if min_p:
            least = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
            logprobs = mx.where(logprobs < least, -mx.inf, logprobs)
        if top_k:
            logprobs = apply_top_k(logprobs, top_k)
        return logprobs * scale

    return shape
