"""Packed integers of compressed-tensors become affine weights, exactly and without reading any."""

from collections.abc import Mapping

import mlx.core as mx

from ..formats.weights import Format
from .config import ModelArgs
from .tensors import modules


def to_affine(weights: dict[str, mx.array], packed: Mapping[str, Format], args: ModelArgs) -> None:
    """Replace the tensors of each module in ``packed`` by those of an affine weight, in place.

    A code q of b bits stands for ``(q - 2^(b - 1)) * scale``, so its bias is a power of two times
    its scale, and its words are laid out as MLX's own. The part of ``kv_b_proj`` that is transposed
    becomes dense: quantizing it anew would change it.
    """
    transposed = {m.other_forms[0].path: m.path for m in modules(args) if m.kind == "embed_q"}
    for path, fmt in packed.items():
        words = weights.pop(f"{path}.weight_packed").view(mx.uint32)
        scales = weights.pop(f"{path}.weight_scale")
        del weights[f"{path}.weight_shape"]
        parts = {"weight": words, "scales": scales, "biases": scales * -zero_code(fmt)}
        if path in transposed:
            prefix = transposed[path].rpartition(".")[0]
            values = _dequantized(words, scales, fmt)
            embed_q, _ = _per_head(values, args)
            weights[f"{prefix}.embed_q.weight"] = mx.contiguous(embed_q.swapaxes(-1, -2))
            for part, array in parts.items():
                _, rows = _per_head(array, args)
                weights[f"{prefix}.unembed_out.{part}"] = mx.contiguous(rows)
        else:
            weights |= {f"{path}.{part}": array for part, array in parts.items()}


def zero_code(fmt: Format) -> int:
    """The unsigned code that stands for zero."""
    return 1 << (fmt.bits - 1)


def _per_head(rows: mx.array, args: ModelArgs) -> tuple[mx.array, mx.array]:
    """Split rows [heads * (nope + v), n] of ``kv_b_proj`` in [heads, nope, n] and [heads, v, n]."""
    nope = args.qk_nope_head_dim
    heads = rows.reshape(args.num_attention_heads, nope + args.v_head_dim, -1)
    return heads[:, :nope], heads[:, nope:]


def _dequantized(words: mx.array, scales: mx.array, fmt: Format) -> mx.array:
    """The values of packed integers, computed in float32 and rounded once to the scales' dtype."""
    ones = mx.ones(scales.shape)
    codes = mx.dequantize(words, ones, ones * -zero_code(fmt), fmt.group_size, fmt.bits)
    values = codes * mx.repeat(scales.astype(mx.float32), fmt.group_size, axis=-1)
    return values.astype(scales.dtype)
