"""The registry of weight formats (csrc/formats), and a weight in one of them."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from .._ext import Format as Format
from .._ext import Plane, formats, gguf_values

FORMATS = {fmt.name: fmt for fmt in formats()}
DENSE_FORMATS = {fmt.planes[0].dtypes[0]: fmt for fmt in FORMATS.values() if fmt.mode == "dense"}
FP8 = FORMATS["fp8"]
FP8_BLOCK = FP8.group_size  # rows and columns that share a scale
# The formats that mx.quantize packs to; it knows none with a factor per matrix, and no FP8.
QUANTIZED = tuple(
    fmt
    for fmt in FORMATS.values()
    if fmt.mode not in ("dense", "") and not fmt.planes[-1].per_matrix
)
# GGUF's block formats, as they lie in its files: MLX knows none of them either.
GGUF = tuple(fmt for fmt in FORMATS.values() if not fmt.mode and fmt != FP8)
# The last parts of the names of tensors that are planes of some format.
PLANES = tuple(dict.fromkeys(plane.name for fmt in FORMATS.values() for plane in fmt.planes))


class Weight(NamedTuple):
    """A weight matrix [..., n, k].

    Attributes:
        planes: the arrays that `format` names, in its order. A dense weight has one, of floats
            [..., n, k]; FP8 has uint8 [..., n, k] and scales of floats
            [..., ceil(n / 128), k / 128]. GGUF's have uint8 [..., n, bytes], whole blocks as they
            lie in its files. Others have what ``mx.quantize`` returns: uint32
            [..., n, k * bits / 32], then scales and, if the format is affine, biases
            [..., n, k / group_size]. A plane with one element per matrix is [...].
        format: one of `FORMATS`.
    """

    planes: Sequence[mx.array]
    format: Format

    @staticmethod
    def dense(values: mx.array) -> Weight:
        """The weight whose values are floats [..., n, k], in the format of their dtype.

        Raises ValueError if no format has that dtype.
        """
        return Weight((values,), dense_format(values.dtype))

    @property
    def quantization(self) -> dict[str, Any]:
        """The keyword arguments of MLX's ops on packed weights: scales and how to read them."""
        scales = zip(self.format.planes[1:], self.planes[1:], strict=True)
        named = {plane.name: array for plane, array in scales if not plane.per_matrix}
        return named | self.format.parameters

    @property
    def factor(self) -> mx.array | None:
        """The factor [...] of each matrix's products; None where the format has none."""
        return self.planes[-1] if self.format.planes[-1].per_matrix else None


def dequantize(w: Weight, dtype: mx.Dtype) -> mx.array:
    """The values [..., n, k] of a weight that is not dense, in float32 and rounded once."""
    if w.format == FP8:
        return _decoded_fp8(*w.planes).astype(dtype)
    if w.format in GGUF:
        return gguf_values(w).astype(dtype)
    values = mx.dequantize(w.planes[0], **w.quantization, dtype=mx.float32)
    return (values if w.factor is None else values * w.factor[..., None, None]).astype(dtype)


def _decoded_fp8(codes: mx.array, scales: mx.array) -> mx.array:
    """Each code times the scale of its square, in float32."""
    scales = mx.repeat(mx.repeat(scales.astype(mx.float32), FP8_BLOCK, -1), FP8_BLOCK, -2)
    return mx.from_fp8(codes, mx.float32) * scales[..., : codes.shape[-2], : codes.shape[-1]]


def dense_format(dtype: mx.Dtype) -> Format:
    """The format of floats of ``dtype``; raises ValueError if there is none."""
    if dtype not in DENSE_FORMATS:
        expected = ", ".join(str(found) for found in DENSE_FORMATS)
        raise ValueError(f"[formats] a dense weight is one of {expected} but is {dtype}.")
    return DENSE_FORMATS[dtype]


def quantized_format(
    group_size: int | None = None, bits: int | None = None, mode: str = "affine"
) -> Format:
    """The format that ``mx.quantize`` packs to, given its arguments; None is MLX's default.

    Raises ValueError, naming the argument, if there is none.
    """
    of_mode = [fmt for fmt in QUANTIZED if fmt.mode == mode]
    if not of_mode:
        expected = ", ".join(modes())
        raise ValueError(f"[formats] mode must be one of {expected} but is {mode!r}.")
    default = next(fmt for fmt in of_mode if fmt.is_default)
    group_size = default.group_size if group_size is None else group_size
    bits = default.bits if bits is None else bits
    for fmt in of_mode:
        if (fmt.group_size, fmt.bits) == (group_size, bits):
            return fmt
    raise ValueError(
        f"[formats] {mode} has no {bits!r} bits in groups of {group_size!r}, expected one of"
        f" {', '.join(fmt.name for fmt in of_mode)}."
    )


def modes() -> tuple[str, ...]:
    """MLX's quantization modes."""
    return tuple(dict.fromkeys(fmt.mode for fmt in QUANTIZED))


@cache
def plane_names(fmt: Format) -> tuple[str, ...]:
    """The last parts of the names of a weight's tensors, such as ``weight`` and ``scales``."""
    return tuple(plane.name for plane in fmt.planes)


def plane_shape(fmt: Format, plane: Plane, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a plane of a weight [..., n, k] of ``shape``."""
    *matrices, n, k = shape
    if plane.per_matrix:
        return tuple(matrices)
    return (*matrices, -(-n // plane.rows), k // fmt.group_size * plane.count)


def named(name: str) -> Format:
    """The format of that name; raises ValueError if there is none."""
    if name not in FORMATS:
        raise ValueError(f"[formats] {name!r} is none of {', '.join(FORMATS)}.")
    return FORMATS[name]


copyreg.pickle(Format, lambda fmt: (named, (fmt.name,)))
