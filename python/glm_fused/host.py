"""The one way from an ``mx.array`` to NumPy."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


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
