"""Puts the planes of packed weights where the model looks for them, or their values."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from ..formats.weights import QUANTIZED, Format, Weight, dequantize, plane_names
from .config import ModelArgs
from .tensors import modules


class Found(NamedTuple):
    """A packed weight [n, k] of a checkpoint: its path there, and its values as floats [n, k]."""

    path: str
    weight: Weight
    values: mx.array


def put(weights: dict[str, mx.array], found: Iterable[Found], args: ModelArgs) -> None:
    """Add the planes of each weight to ``weights``, under its path.

    ``kv_b_proj`` is split: the part that is transposed, ``embed_q``, becomes dense, since
    quantizing it anew would change it.
    """
    transposed = {m.other_forms[0].path: m.path for m in modules(args) if m.kind == "embed_q"}
    for path, weight, values in found:
        if path in transposed:
            embed_q, _ = _per_head(values, args)
            weights[f"{transposed[path]}.weight"] = mx.contiguous(embed_q.swapaxes(-1, -2))
            path = f"{transposed[path].rpartition('.')[0]}.unembed_out"
            weight = _unembed_out(weight, args)
        planes = zip(plane_names(weight.format), weight.planes, strict=True)
        weights |= {f"{path}.{name}": plane for name, plane in planes}


def dequantize_unknown(weights: dict[str, mx.array], formats: Mapping[str, Format]) -> None:
    """Make dense, as bfloat16, what is in a format that MLX does not know; in place.

    ``formats`` are those of packed modules, which have the names of the model's.
    """
    for path, fmt in formats.items():
        names = [f"{path}.{name}" for name in plane_names(fmt)]
        if fmt in QUANTIZED or not all(name in weights for name in names):
            continue
        weight = Weight([weights.pop(name) for name in names], fmt)
        weights[f"{path}.weight"] = _values(weight)


def _values(weight: Weight) -> mx.array:
    """bfloat16 values; a stack is dequantized a matrix at a time, to need less memory beside it."""
    planes = weight.planes
    if planes[0].ndim == 2:
        return dequantize(weight, mx.bfloat16)
    matrices = [weight._replace(planes=[p[i] for p in planes]) for i in range(len(planes[0]))]
    return stack([dequantize(matrix, mx.bfloat16) for matrix in matrices])


def stack(parts: Sequence[mx.array]) -> mx.array:
    """``mx.stack`` that needs each part only until it is copied.

    The updates reuse one buffer, so evaluation need not hold all the parts beside the result.
    """
    result = mx.zeros((len(parts), *parts[0].shape), parts[0].dtype)
    for i, part in enumerate(parts):
        result[i] = part
    return result


def _unembed_out(weight: Weight, args: ModelArgs) -> Weight:
    """The rows of ``kv_b_proj`` that are not transposed, a matrix per head."""
    heads, format_planes = args.num_attention_heads, weight.format.planes
    planes = [
        mx.broadcast_to(plane, (heads,)) if spec.per_matrix else _per_head(plane, args)[1]
        for spec, plane in zip(format_planes, weight.planes, strict=True)
    ]
    return Weight([mx.contiguous(plane) for plane in planes], weight.format)


def _per_head(rows: mx.array, args: ModelArgs) -> tuple[mx.array, mx.array]:
    """Rows [heads * (nope + v), n] of ``kv_b_proj`` as [heads, nope, n] and [heads, v, n]."""
    nope = args.qk_nope_head_dim
    heads = rows.reshape(args.num_attention_heads, nope + args.v_head_dim, -1)
    return heads[:, :nope], heads[:, nope:]
