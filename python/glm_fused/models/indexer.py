"""The lightning indexer: which cached keys each query of a full layer attends to."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..ops.stock import visible_columns
from .cache import Span, append
from .config import ModelArgs
from .layers import LayerNorm, Linear, is_plain
from .rope import Angles


class Indexer(nn.Module):
    """Scores sum_h w_h relu(q_h . k / sqrt(d)) in float32 and keeps the ``index_topk`` best."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.heads = args.index_n_heads
        self.head_dim = args.index_head_dim
        self.topk = args.index_topk
        self.interleaved = args.indexer_rope_interleave
        self.kv_format = "auto"
        self.wq_b = Linear(args.q_lora_rank, self.heads * self.head_dim)
        self.wk = Linear(args.hidden_size, self.head_dim)
        self.k_norm = LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = Linear(args.hidden_size, self.heads)

    def project(
        self, x: mx.array, q_latent: mx.array, angles: Angles, scores: bool
    ) -> tuple[mx.array, ...]:
        """What scoring needs of x [b, l, hidden] and q_latent [b, l, q_lora_rank].

        Returns the keys [b, 1, l, dim], and if it ``scores`` the queries [b, l, heads, dim] and
        the weights of their heads, float32 [b, l, heads].
        """
        k = ops.rotate(self.k_norm(self.wk(x))[:, None], *angles, self.interleaved)
        if not scores:
            return (k,)
        b, length, _ = x.shape
        q = self.wq_b(q_latent).reshape(b, length, self.heads, self.head_dim)
        q = ops.rotate(q.swapaxes(1, 2), *angles, self.interleaved).swapaxes(1, 2)
        return k, q, self.weights_proj(x.astype(mx.float32))

    def is_plain(self) -> bool:
        """Whether its matrices are all there is: no adapters in training."""
        return is_plain(self.wk) and is_plain(self.wq_b) and is_plain(self.weights_proj)

    def in_block(self, scores: bool) -> ops.blocks.IndexerArguments:
        """What `glm_fused.ops.blocks.attention_project` needs for the same."""
        return ops.blocks.IndexerArguments(
            self.wk.as_weight(),
            (self.k_norm.weight, self.k_norm.eps),
            self.k_norm.bias,
            self.wq_b.as_weight(),
            self.weights_proj.as_weight(),
            self.heads,
            self.interleaved,
            scores,
        )

    def scores(self, span: Span) -> bool:
        """Whether there are more keys than a query may select."""
        return span.total > self.topk

    def append(self, keys: mx.array, cache: Any | None) -> mx.array:
        """Append keys [b, 1, l, dim] to ``cache``; returns all cached keys [b, t, …]."""
        rows, _ = append(cache, keys, None, self.kv_format)
        return rows

    def select(self, q: mx.array, weights: mx.array, keys: mx.array, span: Span) -> mx.array:
        """The selection, int32 [b, l, k], of `glm_fused.ops.indexer_topk` from all cached keys."""
        return ops.indexer_topk(
            q,
            keys,
            weights,
            self.topk,
            scale=self.head_dim**-0.5,
            weight_scale=self.heads**-0.5,
            start=span.start,
        )


def every_key(shape: tuple[int, ...], span: Span) -> mx.array:
    """The selection, int32 [b, l, t], of all keys that are visible to queries [b, l, …]."""
    columns = mx.arange(span.total, dtype=mx.int32)[None, None]
    visible = visible_columns(columns, span.length, span.total, 0, span.length, span.start)
    return mx.broadcast_to(mx.where(visible, columns, -1), (*shape[:2], span.total))
