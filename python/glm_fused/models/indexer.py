"""The lightning indexer: which cached keys each query of a full layer attends to."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .cache import Span, append
from .config import ModelArgs
from .layers import LayerNorm, Linear
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

    def __call__(
        self, x: mx.array, q_latent: mx.array, span: Span, angles: Angles, cache: Any | None
    ) -> tuple[mx.array | None, mx.array]:
        """Select keys for x [b, l, hidden] and q_latent [b, l, q_lora_rank].

        Returns the selection of `glm_fused.ops.indexer_topk`, which is None while every key is
        selected, and all cached keys [b, t, …].
        """
        k = ops.rotate(self.k_norm(self.wk(x))[:, None], *angles, self.interleaved)
        keys, _ = append(cache, k, None, self.kv_format)
        if span.total <= self.topk:
            return None, keys
        b, length, _ = x.shape
        q = self.wq_b(q_latent).reshape(b, length, self.heads, self.head_dim)
        q = ops.rotate(q.swapaxes(1, 2), *angles, self.interleaved).swapaxes(1, 2)
        weights = self.weights_proj(x.astype(mx.float32)) * self.heads**-0.5
        scale = self.head_dim**-0.5
        return ops.indexer_topk(q, keys, weights, self.topk, scale=scale, start=span.start), keys
