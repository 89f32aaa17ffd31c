"""Random weights in every format the ops accept, for the kernel tests."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from glm_fused import ops
from glm_fused.formats.weights import quantized_format

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

AFFINE = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
NAN = {mx.uint8: 0xFF, mx.uint32: 0xFFFFFFFF}  # of codes, if they have one
FORMATS = [*AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16), ("dense", 0, 0)]


def format_id(fmt: tuple[str, int, int]) -> str:
    mode, bits, group = fmt
    return mode if mode == "dense" else quantized_format(group, bits, mode).name


def random_weight(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    fmt: tuple[str, int, int],
    float_dtype: mx.Dtype = mx.bfloat16,
) -> ops.Weight:
    """A weight of `shape` [..., n, k]; `float_dtype` is that of dense weights or affine scales."""
    mode, bits, group = fmt
    values = mx.array(rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[-1]))
    if mode == "dense":
        return ops.Weight.dense(values.astype(float_dtype))
    found = quantized_format(group, bits, mode)
    if mode == "affine":
        return ops.Weight(mx.quantize(values.astype(float_dtype), **found.parameters), found)
    # MLX packs eight elements at a time: quantize whole rows of eight, keep the first n.
    n = shape[-2]
    padded = mx.concatenate([values] * (8 // min(n, 8) + 1), axis=-2)[..., : -(-n // 8) * 8, :]
    planes = mx.quantize(padded, **found.parameters)
    return ops.Weight([plane[..., :n, :] for plane in planes], found)


def poison(w: ops.Weight, unused: list[int]) -> ops.Weight:
    """`w` with NaN in the slots `unused`: NaN scales, or NaN weights where dense."""
    if not unused:
        return w
    planes = [mx.array(plane) for plane in w.planes]
    for plane in planes:
        plane[mx.array(unused)] = NAN.get(plane.dtype, float("nan"))
    return w._replace(planes=planes)


def dequantized(w: ops.Weight) -> np.ndarray:
    """The weight in float64."""
    weight, *scales = w.planes
    if w.format.mode == "dense":
        return np.array(weight.astype(mx.float32), dtype=np.float64)
    if w.format.mode == "affine":
        scales = [a.astype(mx.float32) for a in scales]
    values = mx.dequantize(weight, *scales, **w.format.parameters, dtype=mx.float32)
    return np.array(values, dtype=np.float64)


def bits_of(a: mx.array) -> np.ndarray:
    """The array's bit patterns as integers; NaN payloads included."""
    mx.eval(a)
    unsigned = {4: mx.uint32, 2: mx.uint16}[a.dtype.size]
    return np.array(a.view(unsigned))


def assert_same_bits(a: mx.array, b: mx.array) -> None:
    x, y = bits_of(a), bits_of(b)
    assert x.shape == y.shape
    different = np.argwhere(x != y)
    assert different.size == 0, (
        f"{len(different)} of {x.size} values differ in bits, first at {different[0].tolist()}: "
        f"{x[tuple(different[0])]:#x} and {y[tuple(different[0])]:#x}"
    )
