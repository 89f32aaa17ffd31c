"""Says which argument of an op the compiled extension does not take, once it has refused a call."""

from __future__ import annotations

import numbers
from collections.abc import Iterator

import mlx.core as mx

from ..formats.weights import Format, Weight
from ..validation import show


def unfit(op: str, **arguments: object) -> ValueError | TypeError:
    """The error to raise in the place of the extension's TypeError, which lists its signature.

    It is a ValueError for a weight whose parts are no arrays or no format, and for an integer that
    exceeds 32 bits, else a TypeError.
    """
    for name, value in arguments.items():
        if isinstance(value, Weight):
            for problem in _problems(name, value):
                return ValueError(f"[{op}] {problem}.")
        if isinstance(value, numbers.Integral) and not -(2**31) <= int(value) < 2**31:
            return ValueError(f"[{op}] {name} must fit 32 bits but is {show(int(value))}.")
    kinds = ", ".join(
        f"{name} {type(value).__name__}"
        for name, value in arguments.items()
        if not isinstance(value, mx.array | Weight)
    )
    return TypeError(f"[{op}] expects mlx arrays and numbers but got, beside arrays, {kinds}.")


def _problems(name: str, weight: Weight) -> Iterator[str]:
    """What of a weight the extension cannot take."""
    planes: object = weight.planes
    if not isinstance(planes, list | tuple):
        yield f"{name}.planes must be a sequence of arrays but is of type {type(planes).__name__}"
        return
    for i, plane in enumerate(planes):
        if not isinstance(plane, mx.array):
            yield f"{name}.planes[{i}] must be an array but is of type {type(plane).__name__}"
    fmt: object = weight.format
    if not isinstance(fmt, Format):
        yield f"{name}.format must be one of FORMATS but is of type {type(fmt).__name__}"
