"""Where evaluation ends: the one way from an ``mx.array`` to NumPy, and waiting for the rest."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .environment import debug


def to_numpy(array: mx.array) -> NDArray[Any]:
    """A copy of ``array`` [...], evaluated here; the dtype is NumPy's of the same name.

    ``np.array(array)`` would evaluate it too, but NumPy swallows what evaluation raises, asks
    again by another protocol, and MLX then hands out the memory that was never written.

    Raises what the evaluation of ``array`` raises, and ValueError for bfloat16, which NumPy
    does not have: take ``astype`` or ``view`` first.
    """
    if not isinstance(array, mx.array):
        raise ValueError(f"[to_numpy] array must be an mx.array but is {type(array).__name__}.")
    if array.dtype == mx.bfloat16:
        raise ValueError("[to_numpy] array is bfloat16, which NumPy does not have.")
    mx.eval(array)
    return np.array(array)


def settle(stream: mx.Stream | mx.ThreadLocalStream) -> None:
    """Wait until all that was enqueued on ``stream`` is over, whatever became of it.

    For what is evaluated ahead and then not asked for, or abandoned after an error: MLX keeps its
    error for whoever uses the stream next, and the arrays must not go before the work does.
    """
    while True:
        try:
            mx.synchronize(stream)
            return
        except RuntimeError as error:
            debug("abandoned: %s", error)
