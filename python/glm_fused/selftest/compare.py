"""Takes outputs as bits: their digests, and where two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..host import to_numpy

Outputs = Sequence[npt.NDArray[Any]]  # bit patterns of floats (unsigned), and integers (int32)
GOLDEN = "golden.json"
_VIEWS = {mx.bfloat16: mx.uint16, mx.float16: mx.uint16, mx.float32: mx.uint32}


def evaluated(arrays: Iterable[mx.array]) -> Outputs:
    """Evaluate arrays and return their bit patterns, NaN payloads included."""
    arrays = list(arrays)
    mx.eval(arrays)
    return [to_numpy(a.view(_VIEWS[a.dtype]) if a.dtype in _VIEWS else a) for a in arrays]


def digest(outputs: Outputs) -> str:
    """The SHA-256, in hexadecimal, of the outputs' little-endian bytes, one after the other."""
    sha = hashlib.sha256()
    for a in outputs:
        sha.update(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.hexdigest()


@cache
def golden() -> dict[str, dict[str, Any]]:
    """The golden digests of each case: "on" with a*b+c contracted to an fma, "off" without.

    A case that has been renamed also has its "seed".
    """
    text = (resources.files(__package__) / GOLDEN).read_text("utf-8")
    return cast(dict[str, dict[str, Any]], json.loads(text)["digests"])


def contraction(case: str, found: str) -> str | None:
    """Which golden digests `found` equals: on, off, either or neither; None where none is kept."""
    kept = golden().get(case)
    if kept is None:
        return None
    if kept["on"] == kept["off"] == found:
        return "either"
    return next((mode for mode in ("on", "off") if kept[mode] == found), "neither")


def first_difference(found: Outputs, expected: Outputs) -> dict[str, Any] | None:
    """Where the bits first differ and how many do; None when they are the same."""
    for output, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            shapes = f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
            return {"output": output, "shapes": shapes}
        different = np.argwhere(a != b)
        if len(different):
            index = tuple(different[0])
            return {
                "output": output,
                "count": len(different),
                "of": a.size,
                "index": [int(i) for i in index],
                "bits": [f"{int(v[index]) & _mask(v):#x}" for v in (a, b)],
            }
    return None


def ulps(found: Outputs, expected: Outputs, dtype: mx.Dtype) -> float | None:
    """The largest difference of floats, in ulps of the output's largest expected value.

    `dtype` is the dtype of outputs with two bytes an element. Returns None where a value is not
    finite.
    """
    most = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.dtype.kind == "u" and a.size:
            kind = mx.float32 if a.itemsize == 4 else dtype
            x, y = _float64(a, kind), _float64(b, kind)
            largest = np.abs(y).max()
            if not (np.isfinite(x).all() and np.isfinite(largest)):
                return None
            ulp = 2.0 ** (np.frexp(largest)[1] - 1) * mx.finfo(kind).eps
            most = max(most, float(np.abs(x - y).max() / ulp))
    return most


def _float64(bits: npt.NDArray[Any], dtype: mx.Dtype) -> npt.NDArray[np.float64]:
    return to_numpy(mx.array(bits).view(dtype).astype(mx.float32)).astype(np.float64)


def _mask(a: npt.NDArray[Any]) -> int:
    return (1 << 8 * a.itemsize) - 1
