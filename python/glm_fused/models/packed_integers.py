"""Packed integers of compressed-tensors become affine weights, exactly and without reading any."""

from collections.abc import Iterator, Mapping

import mlx.core as mx

from ..formats.weights import Format, Weight
from .config import ModelArgs
from .planes import Found, put


def to_affine(weights: dict[str, mx.array], packed: Mapping[str, Format], args: ModelArgs) -> None:
    """Replace the tensors of each module in ``packed`` by those of an affine weight, in place.

    A code q of b bits stands for ``(q - 2^(b - 1)) * scale``, so its bias is a power of two times
    its scale, and the words are MLX's own.
    """
    put(weights, _taken(weights, packed), args)


def _taken(weights: dict[str, mx.array], packed: Mapping[str, Format]) -> Iterator[Found]:
    for path, fmt in packed.items():
        words = weights.pop(f"{path}.weight_packed").view(mx.uint32)
        scales = weights.pop(f"{path}.weight_scale")
        del weights[f"{path}.weight_shape"]
        weight = Weight((words, scales, scales * -zero_code(fmt)), fmt)
        yield Found(path, weight, _dequantized(words, scales, fmt))


def zero_code(fmt: Format) -> int:
    """The unsigned code that stands for zero."""
    return 1 << (fmt.bits - 1)


def _dequantized(words: mx.array, scales: mx.array, fmt: Format) -> mx.array:
    """The values of packed integers, computed in float32 and rounded once to the scales' dtype."""
    ones = mx.ones(scales.shape)
    codes = mx.dequantize(words, ones, ones * -zero_code(fmt), fmt.group_size, fmt.bits)
    values = codes * mx.repeat(scales.astype(mx.float32), fmt.group_size, axis=-1)
    return values.astype(scales.dtype)
