"""Outputs as bits: digests, and where two differ."""

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

Outputs = Sequence[npt.NDArray[Any]]  # bit patterns of floats (unsigned), and integers (int32)
GOLDEN = "golden.json"
_VIEWS = {mx.bfloat16: mx.uint16, mx.float16: mx.uint16, mx.float32: mx.uint32}


def evaluated(arrays: Iterable[mx.array]) -> Outputs:
    """Evaluate and return bit patterns; NaN payloads included."""
    arrays = list(arrays)
    mx.eval(arrays)
    return [np.array(a.view(_VIEWS[a.dtype]) if a.dtype in _VIEWS else a) for a in arrays]


def digest(outputs: Outputs) -> str:
    """SHA-256 of the outputs' bytes, little-endian, one after the other."""
    sha = hashlib.sha256()
    for a in outputs:
        sha.update(a.astype(a.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.hexdigest()


@cache
def golden() -> dict[str, dict[str, str]]:
    """Per case the digests with a*b+c contracted to an fma ("on"), and without ("off")."""
    text = (resources.files(__package__) / GOLDEN).read_text("utf-8")
    return cast(dict[str, dict[str, str]], json.loads(text)["digests"])


def contraction(case: str, found: str) -> str | None:
    """Which golden digests `found` equals: on, off, either or neither; None where none is kept."""
    kept = golden().get(case)
    if kept is None:
        return None
    matching = [mode for mode in ("on", "off") if kept[mode] == found]
    return {0: "neither", 1: (matching or [""])[0], 2: "either"}[len(matching)]


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


def ulps(found: Outputs, expected: Outputs) -> int:
    """The largest distance between floats of the same place, in steps between neighbours."""
    most = 0
    for a, b in zip(found, expected, strict=True):
        if a.dtype.kind == "u" and a.size:
            most = max(most, int(np.abs(_ordered(a) - _ordered(b)).max()))
    return most


def _mask(a: npt.NDArray[Any]) -> int:
    return (1 << 8 * a.itemsize) - 1


def _ordered(bits: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Integers in the order of the floats; both zeros are 0."""
    sign = 1 << (8 * bits.itemsize - 1)
    magnitude = (bits & (sign - 1)).astype(np.int64)
    return np.where(bits & sign, -magnitude, magnitude)
