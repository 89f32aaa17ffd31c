"""Steps of moe_decode that MLX has no op for; with ``gather_qmm`` they are its unfused chain."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from . import routes
from .routes import Kernel, Stream


def swiglu(gate: mx.array, up: mx.array, *, stream: Stream = None) -> mx.array:
    """``silu(gate) * up``, with every step rounded to the inputs' dtype as moe_decode rounds it.

    Args:
        gate: float32, float16 or bfloat16, of any shape.
        up: the same shape and dtype as `gate`.
        stream: where to run; None: the default device.

    Returns:
        The shape and dtype of `gate`.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    return _ext.swiglu(gate, up, _kernel(stream), stream)


def expert_sum(y: mx.array, scores: mx.array, *, stream: Stream = None) -> mx.array:
    """``sum_i scores[t, i] * y[t, i]``, added in fp32 and in order, as moe_decode adds.

    Args:
        y: float32, float16 or bfloat16 [tokens, top_k, hidden].
        scores: float [tokens, top_k].
        stream: where to run; None: the default device.

    Returns:
        [tokens, hidden] in y's dtype.

    Raises:
        ValueError: the shapes or dtypes do not fit.
    """
    return _ext.expert_sum(y, scores, _kernel(stream), stream)


def _kernel(stream: Stream) -> _ext.Kernel:
    return Kernel.metal if routes.has_metal(stream) else Kernel.cpu
