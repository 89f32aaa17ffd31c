"""Puts the planes of packed weights where the model looks for them."""

from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx

from ..formats.weights import Weight, plane_names
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
