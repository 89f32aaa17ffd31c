"""Norms and rotary embedding, what a layer does between its matrices, in a written-out order."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from . import routes, stock
from .routes import Kernel, Stream
from .unfit import unfit


def rms_norm(
    x: mx.array,
    weight: mx.array,
    eps: float,
    *,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis (https://arxiv.org/abs/1910.07467).

    The squares are summed in fp32, in the order of `quantized_matvec` with a dense weight. x is
    rounded to its dtype after each product, as MLX and transformers round it.

    Args:
        x: float32, float16 or bfloat16 [..., n], of any strides.
        weight: float32, float16 or bfloat16 [n].
        eps: greater than 0.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: a shape or dtype does not fit, or eps is not greater than 0.
    """
    kernel = routes.take("rms_norm", stream=stream, reference=reference)
    try:
        if kernel is Kernel.mlx:
            with routes.on(stream):
                return stock.rms_norm(x, weight, eps)
        return _ext.rms_norm(x, weight, eps, kernel, stream)
    except TypeError:
        raise unfit("rms_norm", x=x, weight=weight, eps=eps) from None


def layer_norm(
    x: mx.array,
    weight: mx.array,
    bias: mx.array,
    eps: float,
    *,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis.

    Sums are those of `rms_norm`, with the mean taken off before squaring
    (https://arxiv.org/abs/1607.06450). x is rounded to its dtype after each product and the sum.

    Args:
        x: float32, float16 or bfloat16 [..., n], of any strides.
        weight: float32, float16 or bfloat16 [n].
        bias: float32, float16 or bfloat16 [n].
        eps: greater than 0.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: a shape or dtype does not fit, or eps is not greater than 0.
    """
    kernel = routes.take("layer_norm", stream=stream, reference=reference)
    try:
        if kernel is Kernel.mlx:
            with routes.on(stream):
                return stock.layer_norm(x, weight, bias, eps)
        return _ext.layer_norm(x, weight, bias, eps, kernel, stream)
    except TypeError:
        raise unfit("layer_norm", x=x, weight=weight, bias=bias, eps=eps) from None


def rotate(
    x: mx.array,
    cos: mx.array,
    sin: mx.array,
    interleaved: bool = True,
    *,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """Rotary embedding (https://arxiv.org/abs/2104.09864): rotate the leading columns in fp32.

    With ``w = 2 * pairs`` columns to rotate, pairs are (0, 1), (2, 3), … when `interleaved`, else
    (0, w / 2), (1, w / 2 + 1), …; the other columns stay as they are. Every product and sum is
    rounded to fp32, and the result to x's dtype.

    Args:
        x: float32, float16 or bfloat16 [b, h, l, d], of any strides.
        cos: float32 [b or 1, 1, l, pairs], with pairs at most d / 2, of any strides.
        sin: float32, the shape of `cos`.
        interleaved: which columns are a pair.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    kernel = routes.take("rotate", stream=stream, reference=reference)
    try:
        if kernel is Kernel.mlx:
            with routes.on(stream):
                return stock.rotate(x, cos, sin, interleaved)
        return _ext.rotate(x, cos, sin, interleaved, kernel, stream)
    except TypeError:
        raise unfit("rotate", x=x, cos=cos, sin=sin, interleaved=interleaved) from None
