"""NVFP4 weights of modelopt become those of ``nvfp4-global``, without reading any."""

from collections.abc import Iterator, Mapping

import mlx.core as mx

from ..formats.weights import Format, Weight, dequantize
from .config import ModelArgs
from .planes import Found, put


def to_nvfp4(weights: dict[str, mx.array], packed: Mapping[str, Format], args: ModelArgs) -> None:
    """Replace the tensors of each module in ``packed`` by planes of its format, in place.

    The bytes stay as they are: of the two codes in one, the low half is of the even column, as in
    MLX's words. ``weight_scale_2`` is the factor of the matrix.
    """
    put(weights, _taken(weights, packed), args)


def _taken(weights: dict[str, mx.array], packed: Mapping[str, Format]) -> Iterator[Found]:
    for path, fmt in packed.items():
        words = weights.pop(f"{path}.weight").view(mx.uint32)
        scales = weights.pop(f"{path}.weight_scale")
        factor = weights.pop(f"{path}.weight_scale_2").reshape(())
        weights.pop(f"{path}.input_scale", None)
        weight = Weight((words, scales, factor), fmt)
        yield Found(path, weight, dequantize(weight, mx.bfloat16))
