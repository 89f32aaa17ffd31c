"""Says which argument of an op the compiled extension does not take, once it has refused a call."""

from __future__ import annotations

import numbers
from collections.abc import Iterator

import mlx.core as mx

from ..formats.weights import Format, Weight
from ..validation import show


def unfit(op: str, **arguments: object) -> ValueError | TypeError:
    """The error to raise in the place of the extension's TypeError, which lists its signature.

    It is a ValueError where an integer exceeds 32 bits, else a TypeError.
    """
    for name, value in _flat(arguments):
        if isinstance(value, numbers.Integral) and not -(2**31) <= int(value) < 2**31:
            return ValueError(f"[{op}] {name} must fit 32 bits but is {show(int(value))}.")
    kinds = ", ".join(
        f"{name} {type(value).__name__}"
        for name, value in _flat(arguments)
        if not isinstance(value, mx.array)
    )
    return TypeError(f"[{op}] expects mlx arrays and numbers but got, beside arrays, {kinds}.")


def _flat(arguments: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Every argument with its name; a weight gives its planes, and its format if that is none."""
    for name, value in arguments.items():
        if isinstance(value, Weight):
            planes, fmt = value.planes, value.format
            if isinstance(planes, list | tuple):
                yield from ((f"{name}.planes[{i}]", plane) for i, plane in enumerate(planes))
            else:
                yield f"{name}.planes", planes
            if not isinstance(fmt, Format):
                yield f"{name}.format", fmt
        else:
            yield name, value
