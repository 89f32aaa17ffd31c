"""Weights and activations made of random bits.

They are computed in integers alone, so a seed gives the same bits on every platform and version of
numpy; `mx.quantize` would not promise that.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..formats.gguf_scales import IQ1_M, MXFP4, NIBBLES, places_of_halves
from ..formats.weights import FP8, GGUF, Format, Weight, plane_shape

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}

# Each dtype has so many mantissa bits and this exponent bias.
_LAYOUTS = {mx.bfloat16: (7, 127), mx.float16: (10, 15), mx.float32: (23, 127)}
_UNSIGNED: dict[mx.Dtype, type[np.unsignedinteger[Any]]] = {
    mx.bfloat16: np.uint16,
    mx.float16: np.uint16,
    mx.float32: np.uint32,
}
_MAX_WORDS = 1 << 24  # beyond these the words repeat, from too far back for a cache to hold


# Of GGUF's formats, about log2 of the largest value of a block whose half is 1.
_GGUF_SIZES = {
    **{"q8_0": 7, "q4_0": 3, "q5_0": 4, "iq4_nl": 7, "ggml-mxfp4": 4},
    **{"q2_k": 6, "q3_k": 7, "q4_k": 10, "q5_k": 11, "q6_k": 12},
    **{"iq1_s": 4, "iq1_m": 4, "iq2_xxs": 7, "iq2_xs": 7, "iq2_s": 7},
    **{"iq3_xxs": 9, "iq3_s": 9, "iq4_xs": 12},
}


def _half(top: int, random: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """The bits of halves from 2 ** top on, below twice that."""
    mantissa = random.astype(np.uint16) << np.uint16(2)
    if top >= -14:
        return np.uint16(top + 15 << 10) | mantissa
    return (np.uint16(1024) | mantissa) >> np.uint16(-14 - top)


class Bits:
    """A stream of random bits."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.PCG64(seed)

    def words(self, *shape: int) -> npt.NDArray[np.uint32]:
        """Random uint32 of a shape."""
        return np.resize(self._words(math.prod(shape)), shape)

    def floats(
        self, shape: tuple[int, ...], dtype: mx.Dtype, top: int = 0, spread: int = 4
    ) -> mx.array:
        """Random floats below ``2 ** (top + 1)`` in magnitude, of `spread` exponents."""
        mantissa_bits, bias = _LAYOUTS[dtype]
        raw = self._words(math.prod(shape)).astype(np.int64)
        exponent = np.maximum(bias + top - (raw >> 28 & 7) % spread, 1)
        sign = raw >> 31 << (8 * dtype.size - 1)
        bits = sign | exponent << mantissa_bits | raw & (2**mantissa_bits - 1)
        return mx.array(np.resize(bits.astype(_UNSIGNED[dtype]), shape)).view(dtype)

    def _words(self, count: int) -> npt.NDArray[np.uint32]:
        count = min(count, _MAX_WORDS)
        raw = self._generator.random_raw((count + 1) // 2)
        return raw.astype("<u8").view("<u4")[:count]

    def weight(self, shape: tuple[int, ...], fmt: Format, dtype: mx.Dtype) -> Weight:
        """A weight [..., n, k] whose products with values near 1 are near 1.

        `dtype` is the dtype of affine scales.
        """
        *lead, k = shape
        size = -(k.bit_length() // 2)  # log2 of about 1 / sqrt(k)
        if fmt.mode == "dense":
            return Weight((self.floats(shape, fmt.planes[0].dtypes[0], size + 1),), fmt)
        if fmt in GGUF:
            return Weight((mx.array(self._blocks(shape, fmt, size)),), fmt)
        packed = self.words(*lead, k * fmt.bits // 32)
        groups = plane_shape(fmt, fmt.planes[1], shape)
        if fmt == FP8:
            codes = mx.array(packed & np.uint32(0xBFBFBFBF)).view(mx.uint8)  # no NaN codes
            return Weight((codes, mx.abs(self.floats(groups, dtype, size, spread=1))), fmt)
        if fmt.mode == "affine":
            top = 2 - fmt.bits + size
            scales = mx.abs(self.floats(groups, dtype, top, spread=1))
            biases = -mx.abs(self.floats(groups, dtype, top + fmt.bits - 1, spread=1))
            return Weight((mx.array(packed), scales, biases), fmt)
        if fmt.mode == "mxfp8":
            packed &= np.uint32(0xBFBFBFBF)  # no NaN codes
        planes = [mx.array(packed), mx.array(self._scale_bytes(groups, fmt, size))]
        if fmt.planes[-1].per_matrix:
            planes.append(mx.abs(self.floats(tuple(lead[:-1]), mx.float32, spread=1)))
        return Weight(planes, fmt)

    def _blocks(self, shape: tuple[int, ...], fmt: Format, size: int) -> npt.NDArray[np.uint8]:
        *lead, k = shape
        count = fmt.planes[0].count
        rows = self.words(*lead, k // fmt.group_size, -(-count // 4))
        blocks = rows.astype("<u4").view(np.uint8)[..., :count].copy()
        top = size - _GGUF_SIZES[fmt.name]  # log2 of the block's scale
        if fmt.name == MXFP4:
            blocks[..., 0] = 128 + top - (blocks[..., 0] & 3)
        elif fmt.name == IQ1_M:
            half = _half(top, blocks[..., NIBBLES + 1])
            for i, at in enumerate(range(NIBBLES + 1, NIBBLES + 8, 2)):
                nibble = (half >> 4 * i & 15).astype(np.uint8)
                blocks[..., at] = blocks[..., at] & 15 | nibble << 4
        else:
            for at in places_of_halves(fmt):
                half = _half(top, blocks[..., at])
                blocks[..., at], blocks[..., at + 1] = half & 255, half >> 8
        return blocks.reshape(*lead, -1)

    def _scale_bytes(self, shape: tuple[int, ...], fmt: Format, size: int) -> npt.NDArray[np.uint8]:
        raw = self.words(*shape)
        if fmt.mode == "nvfp4":  # e4m3, normal numbers
            return (max(6 + size, 1) << 3 | raw & 7).astype(np.uint8)
        top = 127 + size + (2 if fmt.mode == "mxfp8" else 0)
        return (top - (raw & 3)).astype(np.uint8)

    def choices(self, rows: int, count: int, of: int) -> npt.NDArray[np.int32]:
        """Integers int32 [rows, count] in [0, of), distinct within a row."""
        order = np.argsort(self.words(rows, of), axis=1, kind="stable")
        return order[:, :count].astype(np.int32)
