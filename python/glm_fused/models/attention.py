"""Absorbed multi-head latent attention over the selected keys."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from .cache import Span, append
from .config import ModelArgs
from .indexer import Indexer
from .layer_spec import LayerSpec
from .layers import LayerNorm, Linear, MultiLinear, RMSNorm, is_plain, is_recordable, keeps_dtype
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
        norm: RMSNorm,
        span: Span,
        angles: Angles,
        cache: Any | None = None,
        selection: mx.array | None = None,
    ) -> tuple[mx.array, mx.array | None]:
        """The half of a layer: x [b, l, hidden] + attention(norm(x)), and the selection used.

        ``selection`` int32 [b, l, k] is another layer's or an earlier step's. Without one a full
        layer makes its own, unless every visible key is selected, and a shared layer attends to
        these.
        """
        scores = "indexer" in self and selection is None and self.indexer.scores(span)
        in_block = self._takes_block(norm, x)
        project = self._project_in_block if in_block else self._project
        queries, latents, k_pe, *index = project(x, norm, angles, scores)
        latents, ropes = append(None if cache is None else cache[0], latents, k_pe, self.kv_format)
        if "indexer" in self:
            keys = self.indexer.append(index[0], None if cache is None else cache[1])
            if scores:
                selection = self.indexer.select(index[1], index[2], keys, span)
            # Keys that are not scored would otherwise pile up as a chain of unevaluated updates.
            latents = mx.depends(latents, keys)
        how: dict[str, Any] = {
            "rank": self.latent_dim,
            "scale": self.scale,
            "start": span.start,
        }
        attended = (queries, latents, ropes, selection)
        in_block = in_block and is_plain(self.unembed_out) and is_plain(self.o_proj)
        if in_block and ops.blocks.attends(latents, selection):
            values, output = self.unembed_out.as_weight(), self.o_proj.as_weight()
            return ops.blocks.attend(x, *attended, values, output, **how), selection
        out = ops.sparse_mla_decode(*attended, **how)
        if in_block:
            values, output = self.unembed_out.as_weight(), self.o_proj.as_weight()
            return ops.blocks.attention_output(x, out, values, output), selection
        out = self.unembed_out(out.swapaxes(1, 2).astype(queries.dtype))
        return x + self.o_proj(out.swapaxes(1, 2).reshape(*x.shape[:2], -1)), selection

    def is_recordable(self) -> bool:
        """Whether a decode step can be recorded of it: its matrices have no biases or adapters."""
        after = is_recordable(self.unembed_out) and is_recordable(self.o_proj)
        return self._projects_plainly() and after

    def _projects_plainly(self) -> bool:
        """Whether the matrices that come before the caches are all there is."""
        indexer = self.indexer if "indexer" in self else None
        return (
            is_plain(self.q_a_proj)
            and is_plain(self.q_b_proj)
            and is_plain(self.kv_a_proj_with_mqa)
            and is_plain(self.embed_q)
            and (indexer is None or indexer.is_plain())
        )

    def _takes_block(self, norm: RMSNorm, x: mx.array) -> bool:
        """Whether what comes before the caches is one node for x."""
        return ops.blocks.takes(x) and self._projects_plainly() and self.keeps_dtype(norm, x)

    def keeps_dtype(self, norm: RMSNorm, x: mx.array) -> bool:
        """Whether no norm widens what it is given, as one with a wider weight would."""
        norms: list[RMSNorm | LayerNorm] = [norm, self.q_a_layernorm, self.kv_a_layernorm]
        if "indexer" in self:
            norms.append(self.indexer.k_norm)
        return all(keeps_dtype(norm, x) for norm in norms)

    def _project(
        self, x: mx.array, norm: RMSNorm, angles: Angles, scores: bool
    ) -> tuple[mx.array, ...]:
        """What `glm_fused.ops.blocks.attention_project` gives, by one op after the other."""
        b, length, _ = x.shape
        h = norm(x)
        q_latent = self.q_a_layernorm(self.q_a_proj(h))
        q = self.q_b_proj(q_latent).reshape(b, length, self.heads, -1).swapaxes(1, 2)
        q_nope, q_pe = mx.split(q, [self.nope_dim], axis=-1)
        latents, k_pe = mx.split(self.kv_a_proj_with_mqa(h)[:, None], [self.latent_dim], axis=-1)
        latents, k_pe = self.kv_a_layernorm(latents), ops.rotate(k_pe, *angles)
        queries = mx.concatenate([self.embed_q(q_nope), ops.rotate(q_pe, *angles)], axis=-1)
        projected = (queries.swapaxes(1, 2), latents, k_pe)
        if "indexer" not in self:
            return projected
        return *projected, *self.indexer.project(h, q_latent, angles, scores)

    def _project_in_block(
        self, x: mx.array, norm: RMSNorm, angles: Angles, scores: bool
    ) -> tuple[mx.array, ...]:
        """The same in one node of the graph."""
        return ops.blocks.attention_project(
            x,
            *angles,
            (norm.weight, norm.eps),
            self.q_a_proj.as_weight(),
            (self.q_a_layernorm.weight, self.q_a_layernorm.eps),
            self.q_b_proj.as_weight(),
            self.kv_a_proj_with_mqa.as_weight(),
            (self.kv_a_layernorm.weight, self.kv_a_layernorm.eps),
            self.embed_q.as_weight(),
            self.nope_dim,
            self.indexer.in_block(scores) if "indexer" in self else None,
        )
