"""Absorbed multi-head latent attention over the selected keys."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .cache import Span, append
from .config import ModelArgs
from .indexer import Indexer
from .layer_spec import LayerSpec
from .layers import Linear, MultiLinear, RMSNorm
from .rope import Angles


class Attention(nn.Module):
    """MLA that works on the cached latents; on full layers only it has an ``indexer``."""

    def __init__(self, args: ModelArgs, layer: LayerSpec):
        super().__init__()
        self.heads = args.num_attention_heads
        self.nope_dim = args.qk_nope_head_dim
        self.latent_dim = args.kv_lora_rank
        self.scale = args.rope.softmax_scale(args.qk_head_dim)
        self.kv_format = "auto"
        hidden, bias = args.hidden_size, args.attention_bias
        self.q_a_proj = Linear(hidden, args.q_lora_rank, bias)
        self.q_a_layernorm = RMSNorm(args.q_lora_rank, eps=1e-6)
        self.q_b_proj = Linear(args.q_lora_rank, self.heads * args.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent_dim + args.qk_rope_head_dim, bias)
        self.kv_a_layernorm = RMSNorm(self.latent_dim, eps=1e-6)
        self.embed_q = MultiLinear(self.nope_dim, self.latent_dim, self.heads)
        self.unembed_out = MultiLinear(self.latent_dim, args.v_head_dim, self.heads)
        self.o_proj = Linear(self.heads * args.v_head_dim, hidden, bias)
        if layer.is_full:
            self.indexer = Indexer(args)

    def __call__(
        self,
        x: mx.array,
        span: Span,
        angles: Angles,
        cache: Any | None = None,
        selection: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """Attend with x [b, l, hidden]; returns an array of that shape and the selection used.

        ``selection`` int32 [b, l, k] is the last full layer's, None where every visible key is
        selected; a full layer replaces it by its own.
        """
        b, length, _ = x.shape
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q = self.q_b_proj(q_latent).reshape(b, length, self.heads, -1).swapaxes(1, 2)
        q_nope, q_pe = mx.split(q, [self.nope_dim], axis=-1)
        latents, k_pe = mx.split(self.kv_a_proj_with_mqa(x)[:, None], [self.latent_dim], axis=-1)
        latents, k_pe = self.kv_a_layernorm(latents), ops.rotate(k_pe, *angles)
        latents, ropes = append(None if cache is None else cache[0], latents, k_pe, self.kv_format)
        if "indexer" in self:
            indexer_cache = None if cache is None else cache[1]
            selection, keys = self.indexer(x, q_latent, span, angles, indexer_cache)
            # Keys that are not scored would otherwise pile up as a chain of unevaluated updates.
            latents = mx.depends(latents, keys)
        queries = mx.concatenate([self.embed_q(q_nope), ops.rotate(q_pe, *angles)], axis=-1)
        out = ops.sparse_mla_decode(
            queries.swapaxes(1, 2),
            latents,
            ropes,
            selection,
            rank=self.latent_dim,
            scale=self.scale,
            start=span.start,
        )
        out = self.unembed_out(out.swapaxes(1, 2).astype(x.dtype))
        return self.o_proj(out.swapaxes(1, 2).reshape(b, length, -1)), selection
