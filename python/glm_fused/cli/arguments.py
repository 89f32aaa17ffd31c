"""Types of command-line arguments; what does not fit is argparse's error."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ..validation import show

DEFAULT_CONTEXT = 4096  # tokens that memory is planned for, unless more are asked for
DEFAULT_TOKENS = 256  # to generate, where the context has room for them


class UsageError(ValueError):
    """Arguments that do not fit together: the command line answers with where its help is."""


class Range(NamedTuple):
    """Which values an option of sampling may have, on the command line and everywhere else."""

    kind: type[int] | type[float]
    valid: Callable[[float], bool]
    expected: str

    def holds(self, value: Any) -> bool:
        return type(value) in (int, self.kind) and self.valid(value)

    @property
    def parse(self) -> Callable[[str], Any]:
        return _parser(self.kind, self.valid, self.expected)


SAMPLING = {
    "temp": Range(float, lambda v: 0 <= v < math.inf, "a number of at least 0"),
    "top_p": Range(float, lambda v: 0 < v <= 1, "a number above 0, up to 1"),
    "top_k": Range(int, lambda v: 0 <= v < 2**31, "an integer of at least 0"),
    "min_p": Range(float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": Range(float, lambda v: 0 < v < math.inf, "a number above 0"),
    "repetition_context_size": Range(int, lambda v: 1 <= v < 2**31, "an integer of at least 1"),
}


def integer(low: int, high: int) -> Callable[[str], int]:
    """An integer from ``low`` to ``high``."""
    return _parser(int, lambda value: low <= value <= high, f"an integer from {low} to {high}")


def number(valid: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """A number that is ``valid``; ``expected`` says which are."""
    return _parser(float, valid, expected)


def path(text: str) -> str:
    """A path, which an empty text is not: it would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return text


def words(text: str) -> str:
    """A text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("expected a text that is not empty")
    return text


def _parser(
    kind: type[int] | type[float], valid: Callable[[float], bool], expected: str
) -> Callable[[str], Any]:
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
            fits = valid(value)
        except ValueError:
            fits = False
        if not fits:
            raise argparse.ArgumentTypeError(f"expected {expected}: {show(text)}")
        return value

    return parse
