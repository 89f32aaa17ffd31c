"""The layer that predicts one token more (MTP), from which drafts come.

Its row i takes the hidden state that the model has, normed, at position i, and the token after it;
what it gives predicts the token after that one. It has a cache of its own, with a row for each of
its rows, whose positions are those of the hidden states. A draft goes on from the hidden state of
the draft before it; such rows are not what the model's own hidden states would make, so they are to
be forgotten once their tokens are known.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from .cache import Span
from .config import ModelArgs
from .layer import DecoderLayer
from .layer_spec import LayerSpec
from .layers import Linear, RMSNorm, is_recordable, keeps_dtype
from .rope import Angles


class SharedHead(nn.Module):
    """The norm before the head, which is the model's."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class MtpLayer(DecoderLayer):
    """A decoder layer of a token's embedding and the hidden state before it."""

    def __init__(self, args: ModelArgs, layer: LayerSpec):
        super().__init__(args, layer)
        hidden, eps = args.hidden_size, args.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps=eps)
        self.hnorm = RMSNorm(hidden, eps=eps)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.shared_head = SharedHead(args)

    def join(self, embedded: mx.array, hidden: mx.array) -> mx.array:
        """The layer's input of embedded tokens and hidden states, all [b, l, hidden]."""
        parts = [self.enorm(embedded), self.hnorm(hidden)]
        joined: mx.array = self.eh_proj(mx.concatenate(parts, axis=-1))
        return joined

    def rows(
        self,
        embedded: mx.array,
        hidden: mx.array,
        span: Span,
        angles: Angles,
        cache: CacheList | None,
        selection: mx.array | None,
    ) -> tuple[mx.array, mx.array | None]:
        """The normed hidden states [b, l, hidden] of the layer's rows, and the selection used."""
        x, selection = self(self.join(embedded, hidden), span, angles, cache, selection)
        return self.shared_head.norm(x), selection

    def is_recordable(self) -> bool:
        """As `DecoderLayer`."""
        return super().is_recordable() and is_recordable(self.eh_proj)

    def keeps_dtype(self, x: mx.array) -> bool:
        """Whether no norm widens x [b, l, hidden]."""
        norms = self.enorm, self.hnorm
        return super().keeps_dtype(x) and all(keeps_dtype(norm, x) for norm in norms)


def check_draft(args: ModelArgs, tokens: mx.array, hidden: Any, selection: Any) -> None:
    """Raise ValueError for what a draft of checked tokens [b, l] cannot be made of."""
    if not args.has_mtp:
        raise ValueError("[model] has no MTP layer; load it with mtp=True to draft with it.")
    shape = (*tokens.shape, args.hidden_size)
    floats = isinstance(hidden, mx.array) and mx.issubdtype(hidden.dtype, mx.floating)
    if not floats or hidden.shape != shape:
        raise ValueError(f"[model] hidden is {_text(hidden)}, expected floats {list(shape)}.")
    if selection is None:
        return
    known = isinstance(selection, mx.array) and selection.dtype == mx.int32
    if not known or selection.ndim != 3 or selection.shape[:2] != tokens.shape:
        expected = f"int32 [{', '.join(map(str, tokens.shape))}, keys] or None"
        raise ValueError(f"[model] selection is {_text(selection)}, expected {expected}.")


def _text(found: Any) -> str:
    if isinstance(found, mx.array):
        return f"{found.dtype} {list(found.shape)}"
    return type(found).__name__
