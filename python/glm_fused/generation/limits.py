"""Which values the options of generation may have, for callers and for the command line.

The command line's help needs them, so nothing here imports MLX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

DEFAULT_TOKENS = 256  # how many tokens to generate, where the context has room for them
MOST_DRAFTS = 8  # tokens that are guessed at a time
AUTO, OFF = "auto", "off"  # instead of their number
MTP, LOOKUP = "mtp", "lookup"  # what guesses them: the model's layer for it, or the text so far
MIXED = f"{MTP}+{LOOKUP}"  # both, of which each time the one that pays


class Range(NamedTuple):
    """Which values an option of sampling may have, on the command line and everywhere else."""

    kind: type[int] | type[float]
    valid: Callable[[float], bool]
    expected: str

    def holds(self, value: Any) -> bool:
        """Whether an option of this kind may have ``value``; a float may be a whole number."""
        return type(value) in (int, self.kind) and self.valid(value)


SAMPLING = {
    "temp": Range(float, lambda v: 0 <= v < math.inf, "a number of at least 0"),
    "top_p": Range(float, lambda v: 0 < v <= 1, "a number above 0, up to 1"),
    "top_k": Range(int, lambda v: 0 <= v < 2**31, "an integer of at least 0"),
    "min_p": Range(float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": Range(float, lambda v: 0 < v < math.inf, "a number above 0"),
    "repetition_context_size": Range(int, lambda v: 1 <= v < 2**31, "an integer of at least 1"),
}
