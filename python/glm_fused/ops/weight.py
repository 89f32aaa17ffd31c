"""A weight matrix as the ops take it."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Weight(NamedTuple):
    """A weight matrix [..., n, k] as MLX lays it out.

    Attributes:
        weight: float [..., n, k], or uint32 [..., n, k * bits / 32] when quantized.
        scales: one per group of `group_size` columns, [..., n, k / group_size]; float for
            ``affine``, uint8 for the ``mx`` and ``nv`` modes, None for ``dense``.
        biases: like `scales`, for ``affine`` only.
        group_size: columns per scale; 0 for ``dense``.
        bits: bits per value; 0 for ``dense``.
        mode: ``dense``, ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    group_size: int = 0
    bits: int = 0
    mode: str = "dense"
