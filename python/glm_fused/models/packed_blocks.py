"""Packed ``kv_b_proj`` of GGUF: rows of ``unembed_out`` stay as they are, ``embed_q`` is dense."""

from collections.abc import Mapping

import mlx.core as mx

from ..formats.weights import Format, Weight, dequantize
from .config import ModelArgs
from .planes import Found, put


def split_blocks(
    weights: dict[str, mx.array], packed: Mapping[str, Format], args: ModelArgs
) -> None:
    """Replace the blocks of each ``kv_b_proj`` in ``packed``, in place; nothing is read."""
    joined = {path: Weight((weights.pop(f"{path}.weight"),), fmt) for path, fmt in packed.items()}
    found = [Found(path, w, dequantize(w, mx.bfloat16)) for path, w in joined.items()]
    put(weights, found, args)
