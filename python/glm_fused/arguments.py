"""Types of command-line arguments; what does not fit is argparse's error."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from .validation import show


def integer(low: int, high: int) -> Callable[[str], int]:
    """An integer from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {low} to {high}: {show(text)}"
            )
        return value

    return parse


def number(valid: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """A number that is ``valid``; ``expected`` says which are."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"expected {expected}: {show(text)}")
        return value

    return parse
