"""Random weights in every format the ops accept, for the kernel tests."""

from __future__ import annotations

import math

import gguf
import mlx.core as mx
import numpy as np

from glm_fused import ops
from glm_fused.formats.weights import GGUF, Format, named, quantized_format
from glm_fused.selftest.synthetic import Bits

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

AFFINE = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
NAN = {mx.uint8: 0xFF, mx.uint32: 0xFFFFFFFF}  # codes that are NaN, in formats that have one
FORMATS = [*AFFINE, ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16), ("dense", 0, 0)]

OURS = [("nvfp4-global", 4, 16), ("fp8", 8, 128)]  # MLX's own kernels do not take these
GGUFS = [(fmt.name, fmt.bits, fmt.group_size) for fmt in GGUF]  # nor these
SMALL_GGUFS = [fmt for fmt in GGUFS if fmt[2] == 32]


def e4m3(code: int) -> float:
    """The value of a code: a sign, four bits of exponent, three of mantissa; 127 is NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    if exponent == 0:
        return (-1) ** (code >> 7) * mantissa * 2.0**-9
    return (-1) ** (code >> 7) * (8 + mantissa) * 2.0 ** (exponent - 10)


E4M3 = np.array([e4m3(code) for code in range(256)])


def format_id(fmt: tuple[str, int, int]) -> str:
    return "dense" if fmt[0] == "dense" else found_format(fmt).name


def found_format(fmt: tuple[str, int, int]) -> Format:
    mode, bits, group = fmt
    return named(mode) if fmt in OURS or fmt in GGUFS else quantized_format(group, bits, mode)


def random_weight(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    fmt: tuple[str, int, int],
    float_dtype: mx.Dtype = mx.bfloat16,
) -> ops.Weight:
    """A weight of `shape` [..., n, k]; dense weights and affine scales have `float_dtype`."""
    mode = fmt[0]
    values = mx.array(rng.standard_normal(shape, dtype=np.float32) / np.sqrt(shape[-1]))
    if mode == "dense":
        return ops.Weight.dense(values.astype(float_dtype))
    found = found_format(fmt)
    if found in GGUF:
        return Bits(int(rng.integers(1 << 30))).weight(shape, found, float_dtype)
    if mode == "fp8":
        return ops.Weight(random_squares(rng, values, float_dtype), found)
    if mode == "affine":
        return ops.Weight(mx.quantize(values.astype(float_dtype), **found.parameters), found)
    # MLX packs eight elements at a time: quantize whole rows of eight, keep the first n.
    n = shape[-2]
    padded = mx.concatenate([values] * (8 // min(n, 8) + 1), axis=-2)[..., : -(-n // 8) * 8, :]
    planes = [plane[..., :n, :] for plane in mx.quantize(padded, **found.parameters)]
    if fmt in OURS:
        planes.append(mx.array(rng.uniform(0.1, 3, shape[:-2]).astype(np.float32)))
    return ops.Weight(planes, found)


def random_squares(
    rng: np.random.Generator, values: mx.array, scale_dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """The planes of an FP8 weight like ``values`` [..., n, k], scales that differ by square."""
    *rows, k = values.shape
    rows[-1] = -(-rows[-1] // 128)
    scales = mx.array(rng.uniform(0.1, 0.5, (*rows, k // 128)).astype(np.float32))
    return mx.to_fp8(values * 10), scales.astype(scale_dtype)


def poison(w: ops.Weight, unused: list[int]) -> ops.Weight:
    """`w` with NaN in the slots `unused`: in the scales, or in the weights of a dense format.

    All ones are NaN in each of GGUF's halves; its MXFP4 has none, and gets the largest values.
    """
    if not unused:
        return w
    planes = [mx.array(plane) for plane in w.planes]
    for plane in planes:
        plane[mx.array(unused)] = NAN.get(plane.dtype, float("nan"))
    return w._replace(planes=planes)


def dequantized(w: ops.Weight) -> np.ndarray:
    """The weight in float64."""
    weight = w.planes[0]
    if w.format.mode == "dense":
        return np.array(weight.astype(mx.float32), dtype=np.float64)
    if w.format.name == "fp8":
        codes, scales = (np.array(plane.astype(mx.float32)) for plane in w.planes)
        squares = scales.repeat(128, -1).repeat(128, -2)[..., : codes.shape[-2], :]
        return E4M3[codes.astype(int)] * squares
    if w.format in GGUF:
        return gguf_dequantized(w).astype(np.float64)
    how = w.quantization
    if w.format.mode == "affine":
        how |= {name: how[name].astype(mx.float32) for name in ("scales", "biases")}
    values = np.array(mx.dequantize(weight, **how, dtype=mx.float32), dtype=np.float64)
    return values if w.factor is None else values * np.array(w.factor)[..., None, None]


def gguf_dequantized(w: ops.Weight) -> np.ndarray:
    """What the gguf package makes of a weight's blocks, float32 [..., n, k]."""
    ggml = w.format.name.removeprefix("ggml-").upper()
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(np.array(w.planes[0]), gguf.GGMLQuantizationType[ggml])


def bits_of(a: mx.array) -> np.ndarray:
    """The array's bit patterns as integers, NaN payloads included."""
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
