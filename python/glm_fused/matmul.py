"""Matrix products of activations."""

import mlx.core as mx

from . import ops


def matmul_nt(a: mx.array, b: mx.array) -> mx.array:
    """a [..., m, k] times the transpose of b [..., n, k], accumulated in a's float32.

    MLX's own CPU matmul runs at about 1 GFLOP/s, and its result for a row depends on how many
    rows come with it, so that prefill and decode would select different keys.
    """
    *lead, m, k = a.shape
    n = b.shape[-2]
    y = ops.quantized_matvec(a.reshape(-1, m, k), ops.Weight(b.reshape(-1, n, k)))
    return y.reshape(*lead, m, n)
