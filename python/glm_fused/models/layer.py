"""One layer of the decoder."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .cache import Span
from .config import ModelArgs
from .layer_spec import LayerSpec
from .layers import MLP, RMSNorm, keeps_dtype
from .moe import MoE
from .rope import Angles


class DecoderLayer(nn.Module):
    """Attention, then a dense MLP or experts, each with its norm and residual."""

    def __init__(self, args: ModelArgs, layer: LayerSpec):
        super().__init__()
        hidden, eps = args.hidden_size, args.rms_norm_eps
        self.self_attn = Attention(args, layer)
        self.mlp = MoE(args, layer) if layer.is_sparse else MLP(hidden, args.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps=eps)

    def __call__(
        self,
        x: mx.array,
        span: Span,
        angles: Angles,
        cache: Any | None,
        selection: mx.array | None,
    ) -> tuple[mx.array, mx.array | None]:
        """Map x [b, l, hidden] to the same shape; also returns the selection for the next layer.

        The ``selection`` that is given is for a shared layer; a full one that is given one, too,
        does not make its own.
        """
        x, selection = self.self_attn(x, self.input_layernorm, span, angles, cache, selection)
        return self.mlp(x, self.post_attention_layernorm), selection

    def is_recordable(self) -> bool:
        """Whether a decode step can be recorded of it: no biases, no adapters, all in memory."""
        return self.self_attn.is_recordable() and self.mlp.is_recordable()

    def keeps_dtype(self, x: mx.array) -> bool:
        """Whether no norm widens x [b, l, hidden]."""
        return self.self_attn.keeps_dtype(self.input_layernorm, x) and keeps_dtype(
            self.post_attention_layernorm, x
        )
