"""What the simulator's tests share."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
DTYPES = {"float": mx.float32, "float16_t": mx.float16, "bfloat16_t": mx.bfloat16}
# Parts of the largest result: they allow one rounding of the output, and a float32 sum.
TOLERANCE = {"float": 2e-6, "float16_t": 1e-3, "bfloat16_t": 6e-3}


def bits(x: mx.array) -> Array:
    """A writable copy of an MLX array's memory; bfloat16 comes as uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def wide(x: Array | mx.array, dtype: str = "float") -> npt.NDArray[np.float64]:
    """The float64 values of an MLX array, or of numpy memory that holds `dtype`."""
    if isinstance(x, mx.array):
        return np.array(x.astype(mx.float32)).astype(np.float64)
    if dtype == "bfloat16_t":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def empty(shape: tuple[int, ...], dtype: str) -> Array:
    """Memory for results, which holds NaN alone."""
    kinds = {"float": np.uint32, "float16_t": np.uint16, "bfloat16_t": np.uint16}
    memory = np.full(shape, -1, kinds[dtype].__name__.lstrip("u")).view(kinds[dtype])
    return memory if dtype == "bfloat16_t" else memory.view(f"f{memory.itemsize}")


def number(value: int, kind: str = "int32") -> Array:
    return np.array([value], kind)


def error(result: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    """The largest difference, as a part of the largest expected value; NaN counts as infinite."""
    worst = np.abs(result - expected).max() / np.abs(expected).max()
    return float(np.nan_to_num(worst, nan=np.inf))
