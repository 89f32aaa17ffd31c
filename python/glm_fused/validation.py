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
    raise ValueError(f"[config] {key} must be {expected}, found {show(found)}.")


def integer(key: str, value: Any, low: int = 1, high: int = MAX_SIZE) -> int:
    if type(value) is not int or not low <= value <= high:
        fail(key, f"an integer from {low} to {high}", value)
    return value


def number(key: str, value: Any, low: float, high: float) -> float:
    """A finite number in [low, high]; JSON writes whole floats as integers."""
    if type(value) not in (int, float) or not low <= value <= high:  # also refuses NaN
        fail(key, f"a number from {low:g} to {high:g}", value)
    return float(value)


def boolean(key: str, value: Any) -> bool:
    if type(value) is not bool:
        fail(key, "true or false", value)
    return value


def choice(key: str, value: Any, *options: str) -> str:
    if not isinstance(value, str) or value not in options:
        fail(key, " or ".join(repr(option) for option in options), value)
    return value


def mapping(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        fail(key, "an object", value)
    return value


def layer_list(key: str, value: Any, num_layers: int, *options: str) -> list[str]:
    """One of ``options`` for every layer."""
    if not isinstance(value, (list, tuple)) or len(value) != num_layers:
        length = f" of length {len(value)}" if isinstance(value, (list, tuple)) else ""
        fail(key, f"a list of {num_layers} entries (num_hidden_layers)", f"{show(value)}{length}")
    for index, entry in enumerate(value):
        choice(f"{key}[{index}]", entry, *options)
    return list(value)


def product(keys: str, limit: int = MAX_SIZE, **sizes: int) -> None:
    """The sizes of one fused axis, which MLX indexes with 32 bits."""
    if math.prod(sizes.values()) > limit:
        fail(keys, f"at most {limit}", " * ".join(f"{v}" for v in sizes.values()))
