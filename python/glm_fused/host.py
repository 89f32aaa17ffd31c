"""Where evaluation ends: the one way from an ``mx.array`` to NumPy, and waiting for the rest."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .environment import debug


def to_numpy(array: mx.array) -> NDArray[Any]:
    """Evaluate ``array`` [...] and return a copy of it, in NumPy's dtype of the same name.

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

    It serves work that was evaluated ahead and is not asked for, or was abandoned after an error:
    MLX would raise the work's error for whoever uses the stream next, and its arrays must not be
    freed before it ends.
    """
    while True:
        try:
            mx.synchronize(stream)
            return
        except RuntimeError as error:
            debug("abandoned: %s", error)
