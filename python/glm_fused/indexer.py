"""The lightning indexer: which cached keys each query of a full layer attends to."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cache import Span, append_indexer_keys
from .chunks import over_queries
from .config import ModelArgs
from .layers import Linear
from .matmul import matmul_nt
from .rope import Angles, rotate
from .topk import topk_indices


class Indexer(nn.Module):
    """Scores sum_h w_h relu(q_h . k / sqrt(d)) in float32 and keeps the ``index_topk`` best."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = args.index_n_heads
        self.head_dim = args.index_head_dim
        self.topk = args.index_topk
        self.interleaved = args.indexer_rope_interleave
        self.wq_b = Linear(args.q_lora_rank, self.heads * self.head_dim)
        self.wk = Linear(args.hidden_size, self.head_dim)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = Linear(args.hidden_size, self.heads)

    def __call__(
        self, x: mx.array, q_latent: mx.array, span: Span, angles: Angles, cache: Any | None
    ) -> tuple[mx.array | None, mx.array]:
        """x [b, l, hidden], q_latent [b, l, q_lora_rank] -> (selection, all keys [b, 1, t, d]).

        The selection is int32 [b, l, topk], ascending, and None while every key is selected. A
        query that sees fewer than topk keys also gets some that it may not attend to.
        """
        k = rotate(self.k_norm(self.wk(x))[:, None], angles, self.interleaved)
        if cache is not None:
            k = append_indexer_keys(cache, k)
        if span.total <= self.topk:
            return None, k
        b, length, _ = x.shape
        q = self.wq_b(q_latent).reshape(b, length, self.heads, self.head_dim)
        q = rotate(q.swapaxes(1, 2), angles, self.interleaved).swapaxes(1, 2)
        weights = self.weights_proj(x.astype(mx.float32)) * self.heads**-0.5
        return self._select(q.astype(mx.float32), k[:, 0], weights, span), k

    def _select(self, q: mx.array, k: mx.array, weights: mx.array, span: Span) -> mx.array:
        """float32 q [b, l, h, d] and weights [b, l, h], k [b, t, d] -> int32 [b, l, topk]."""

        def part(q: mx.array, lo: int, hi: int) -> mx.array:
            b, n, heads, dim = q.shape
            scores = matmul_nt(q.reshape(b, n * heads, dim), k) * self.head_dim**-0.5
            scores = mx.maximum(scores, 0).reshape(b, n, heads, -1)
            total = (weights[:, lo:hi, None] @ scores)[:, :, 0]
            mask = span.mask(lo, hi)
            if mask is not None:
                total = mx.where(mask, total, -mx.inf)
            return topk_indices(total, self.topk)

        return over_queries(part, q, q.shape[0] * self.heads * span.total * 4)
