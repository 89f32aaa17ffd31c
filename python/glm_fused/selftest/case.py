"""What the self-test computes: inputs made of random bits, and the ops called on them.

A case's inputs follow from its name, and its golden digest is kept under it: a case that changes
takes another name, and `tests/make_selftest_golden.py` makes the digests.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import ops
from .synthetic import Bits

Arrays = tuple[mx.array, ...]


@dataclass(frozen=True)
class Case:
    """One call of one op."""

    dtype: str
    tokens: int

    op = ""
    has_metal_kernel = True

    @property
    def name(self) -> str:
        return f"{self.op}/{self.label()}-{self.dtype}-t{self.tokens}"

    def label(self) -> str:
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The op's arguments."""
        raise NotImplementedError

    def call(self, arguments: dict[str, Any], reference: bool) -> Arrays:
        """The op's outputs, not yet evaluated."""
        out = getattr(ops, self.op)(**arguments, reference=reference)
        return out if isinstance(out, tuple) else (out,)

    def sizes(self) -> tuple[int, ...]:
        """What the choice of the op's route depends on: see `glm_fused.ops.routes.choose`."""
        return ()

    def bits(self) -> Bits:
        return Bits(zlib.crc32(self.name.encode()))
