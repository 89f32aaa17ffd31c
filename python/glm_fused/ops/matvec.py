"""Matrix times vectors."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from ..formats.weights import Weight
from . import routes, stock
from .routes import Kernel, Stream
from .unfit import unfit


def quantized_matvec(
    x: mx.array, w: Weight, *, reference: bool | None = None, stream: Stream = None
) -> mx.array:
    """``y[..., m, n] = sum_k x[..., m, k] * W[..., n, k]``, accumulated in fp32.

    Args:
        x: float32, float16 or bfloat16 [..., m, k], or [..., h, m, k] with one matrix per head;
            m is any number of rows.
        w: [n, k], or [h, n, k] with one matrix per head.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        [..., m, n] in x's dtype.

    Raises:
        ValueError: a shape, dtype or format does not fit; the message names the argument.
    """
    kernel = routes.take(
        "quantized_matvec", stream=stream, reference=reference, stock_ops=stock.takes(w)
    )
    if kernel is Kernel.mlx:
        with routes.on(stream):
            return stock.quantized_matvec(x, w)
    try:
        return _ext.quantized_matvec(x, w, kernel, stream)
    except TypeError:
        raise unfit("quantized_matvec", x=x, w=w) from None
