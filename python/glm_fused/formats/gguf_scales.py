"""Where the scales of GGUF's blocks lie."""

from __future__ import annotations

import mlx.core as mx

from .weights import Format

MXFP4 = "ggml-mxfp4"  # its scale is one byte, an exponent
IQ1_M = "iq1_m"  # its half is in the top nibbles of four words
NIBBLES = 48  # where these words begin
_PLACES = {
    **{"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)},
}


def places_of_halves(fmt: Format) -> tuple[int, ...]:
    """The bytes of a block at which a half begins, in a format that has whole ones."""
    return _PLACES.get(fmt.name, (0,))


def block_scales(rows: mx.array, fmt: Format) -> mx.array:
    """The scales [..., n, blocks, 1 or 2] in rows [..., n, bytes]: float16, of MXFP4 uint8."""
    blocks = mx.unflatten(rows, -1, (-1, fmt.planes[0].count))
    if fmt.name == MXFP4:
        return blocks[..., :1]
    if fmt.name == IQ1_M:
        words = blocks[..., NIBBLES:].view(mx.uint16) >> 12
        return (words << mx.array([0, 4, 8, 12], mx.uint16)).sum(-1, keepdims=True).view(mx.float16)
    halves = [blocks[..., at : at + 2].view(mx.float16) for at in places_of_halves(fmt)]
    return mx.concatenate(halves, axis=-1)
