"""Checks of config values: each failure is one ValueError naming key, value and expectation."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

MAX_SIZE = 2**31 - 1


def show(value: object) -> str:
    """A short text for any JSON value, however long, deep or large."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        return reprlib.repr(value)
    except ValueError:  # a nested integer beyond Python's limit for printing
        return f"a {type(value).__name__}"


def fail(key: str, expected: str, found: object) -> NoReturn:
    """Raise the ValueError for a ``key`` that has another value than expected."""
    raise ValueError(f"[config] {key} must be {expected}, found {show(found)}.")


def integer(key: str, value: Any, low: int = 1, high: int = MAX_SIZE) -> int:
    """``value`` if it is an integer in [low, high], else ValueError; booleans are none."""
    if type(value) is not int or not low <= value <= high:
        fail(key, f"an integer from {low} to {high}", value)
    return value


def number(key: str, value: Any, low: float, high: float) -> float:
    """``value`` as a float if it is a finite number in [low, high], else ValueError.

    Integers are taken too, because JSON may write whole floats as integers.
    """
    if type(value) not in (int, float) or not low <= value <= high:  # also refuses NaN
        fail(key, f"a number from {low:g} to {high:g}", value)
    return float(value)


def boolean(key: str, value: Any) -> bool:
    """``value`` if it is a boolean, else ValueError."""
    if type(value) is not bool:
        fail(key, "true or false", value)
    return value


def choice(key: str, value: Any, *options: str) -> str:
    """``value`` if it is one of ``options``, else ValueError."""
    if not isinstance(value, str) or value not in options:
        fail(key, " or ".join(repr(option) for option in options), value)
    return value


def mapping(key: str, value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, else ValueError."""
    if not isinstance(value, Mapping):
        fail(key, "an object", value)
    return value


def layer_list(key: str, value: Any, num_layers: int, *options: str) -> list[str]:
    """``value`` as a list if it has one of ``options`` for every layer, else ValueError."""
    if not isinstance(value, (list, tuple)) or len(value) != num_layers:
        length = f" of length {len(value)}" if isinstance(value, (list, tuple)) else ""
        fail(key, f"a list of {num_layers} entries (num_hidden_layers)", f"{show(value)}{length}")
    for index, entry in enumerate(value):
        choice(f"{key}[{index}]", entry, *options)
    return list(value)


def product(keys: str, limit: int = MAX_SIZE, **sizes: int) -> None:
    """Raise ValueError unless the product of ``sizes``, one fused axis, is at most ``limit``.

    MLX indexes an axis with 32 bits.
    """
    if math.prod(sizes.values()) > limit:
        fail(keys, f"at most {limit}", " * ".join(f"{v}" for v in sizes.values()))
