"""The self-test's cases of rms_norm, layer_norm and rotate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .case import Case
from .synthetic import DTYPES

EPS = 1e-5


@dataclass(frozen=True)
class RmsNorm(Case):
    columns: int

    op = "rms_norm"

    def label(self) -> str:
        return str(self.columns)

    def arguments(self) -> dict[str, Any]:
        bits, dtype = self.bits(), DTYPES[self.dtype]
        x = bits.floats((self.tokens, self.columns), dtype)
        return {"x": x, "weight": bits.floats((self.columns,), dtype), "eps": EPS}


@dataclass(frozen=True)
class LayerNorm(RmsNorm):
    op = "layer_norm"

    def arguments(self) -> dict[str, Any]:
        bits, dtype = self.bits(), DTYPES[self.dtype]
        x = bits.floats((self.tokens, self.columns), dtype)
        weight, bias = bits.floats((2, self.columns), dtype)
        return {"x": x, "weight": weight, "bias": bias, "eps": EPS}


@dataclass(frozen=True)
class Rotate(Case):
    heads: int
    columns: int
    pairs: int
    interleaved: bool

    op = "rotate"

    def label(self) -> str:
        pairs = "pairs" if self.interleaved else "halves"
        return f"{self.heads}x{self.columns}-{self.pairs}{pairs}"

    def arguments(self) -> dict[str, Any]:
        bits = self.bits()
        x = bits.floats((1, self.tokens, self.heads, self.columns), DTYPES[self.dtype])
        angles = (1, 1, self.tokens, self.pairs)  # random bits: no library's sine is the same
        cos, sin = (bits.floats(angles, mx.float32, -1) for _ in range(2))
        return {"x": x.swapaxes(1, 2), "cos": cos, "sin": sin, "interleaved": self.interleaved}


def norm_cases(quick: bool) -> list[Case]:
    """The cases of every dtype; not in quick runs: more tokens, odd sizes, GLM-5's own."""
    made: list[Case] = []
    for dtype in DTYPES:
        made += [
            RmsNorm(dtype, 1, 512),
            LayerNorm(dtype, 1, 128),
            Rotate(dtype, 1, 4, 64, 32, True),
        ]
    if not quick:
        made += [
            RmsNorm("bfloat16", 1, 6144),
            RmsNorm("float32", 3, 333),
            LayerNorm("bfloat16", 2, 129),
            Rotate("bfloat16", 1, 64, 64, 32, True),
            Rotate("bfloat16", 3, 32, 128, 32, False),
            Rotate("float32", 2, 3, 21, 5, True),
        ]
    return made
