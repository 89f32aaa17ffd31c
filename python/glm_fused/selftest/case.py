"""What the self-test computes: inputs made of random bits, and the ops called on them.

A case's inputs follow from its seed. That is the checksum of its name, unless another seed is kept
beside its golden digests. So a case that changes has to take another name, for which
`tests/make_selftest_golden.py` makes digests; one whose name alone changes keeps its seed and its
digests.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import ops
from .compare import golden
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
        """The name that the golden digests are kept under."""
        return f"{self.op}/{self.label()}-{self.dtype}-t{self.tokens}"

    def label(self) -> str:
        """The part of the name that tells formats and sizes."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """The op's arguments."""
        raise NotImplementedError

    def call(self, arguments: dict[str, Any], reference: bool) -> Arrays:
        """The op's outputs, not yet evaluated."""
        out = getattr(ops, self.op)(**arguments, reference=reference)
        return out if isinstance(out, tuple) else (out,)

    def sizes(self) -> tuple[int, ...]:
        """The sizes that `glm_fused.ops.routes.choose` depends on for this op."""
        return ()

    @property
    def seed(self) -> int:
        """The seed of the inputs."""
        checksum = zlib.crc32(self.name.encode())
        return int(golden().get(self.name, {}).get("seed", checksum))

    def bits(self) -> Bits:
        """The random bits that the inputs are made of."""
        return Bits(self.seed)
