"""Chains of a model's layers: those that a decode step goes through, and those of a draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .cache import Span
from .config import ModelArgs
from .layer_spec import LayerSpec
from .rope import Angles


class Chain(Protocol):
    """Which layers of a model a step goes through; it has no state."""

    def specs(self, args: ModelArgs) -> Sequence[LayerSpec]:
        """The layers, an entry of the step's cache each."""

    def roots(self, model: Any) -> Sequence[nn.Module]:
        """All modules that are used, or others that hold them."""

    def is_recordable(self, model: Any) -> bool:
        """Whether the weights of all layers and of the head are arrays in memory."""

    def keeps_dtype(self, model: Any, x: mx.array, given: Sequence[mx.array]) -> bool:
        """Whether no norm widens the rows x [b, l, hidden] of tokens, or what else is given."""

    def run(
        self,
        model: Any,
        x: mx.array,
        given: Sequence[mx.array],
        span: Span,
        angles: Angles,
        cache: Sequence[Any],
    ) -> list[mx.array]:
        """The logits [b, l, vocab] of the rows of tokens, and what else a step gives."""


class Decoding:
    """The chain of a decode step: all layers of the decoder."""

    def specs(self, args: ModelArgs) -> Sequence[LayerSpec]:
        """The decoder's layers."""
        return args.layers

    def roots(self, model: Any) -> list[nn.Module]:
        """The model itself."""
        return [model]

    def is_recordable(self, model: Any) -> bool:
        """Whether all weights that are used are arrays in memory."""
        layers = all(layer.is_recordable() for layer in model.layers)
        return layers and bool(model.has_recordable_head())

    def keeps_dtype(self, model: Any, x: mx.array, given: Sequence[mx.array]) -> bool:
        """Whether no norm of the layers widens x."""
        return all(layer.keeps_dtype(x) for layer in model.layers)

    def run(
        self,
        model: Any,
        x: mx.array,
        given: Sequence[mx.array],
        span: Span,
        angles: Angles,
        cache: Sequence[Any],
    ) -> list[mx.array]:
        """The logits of embedded tokens, and the hidden states behind them, or what is here."""
        outputs: list[mx.array] = model.outputs(model.model.run(x, span, angles, cache))
        return outputs


class Drafting:
    """The chain of a draft, which is given hidden states and maybe a selection."""

    def specs(self, args: ModelArgs) -> Sequence[LayerSpec]:
        """The MTP layer alone."""
        return args.mtp_layers[:1]

    def roots(self, model: Any) -> list[nn.Module]:
        """The layer, and what it shares with the model."""
        shared = [model.lm_head] if "lm_head" in model else []
        return [model.model.mtp, model.model.embed_tokens, *shared]

    def is_recordable(self, model: Any) -> bool:
        """Whether its weights and the head's are arrays in memory."""
        return bool(model.model.mtp.is_recordable() and model.has_recordable_head())

    def keeps_dtype(self, model: Any, x: mx.array, given: Sequence[mx.array]) -> bool:
        """Whether no norm widens x or the hidden states, which are of one type."""
        return bool(given[0].dtype == x.dtype and model.model.mtp.keeps_dtype(x))

    def run(
        self,
        model: Any,
        x: mx.array,
        given: Sequence[mx.array],
        span: Span,
        angles: Angles,
        cache: Sequence[Any],
    ) -> list[mx.array]:
        """The logits of embedded tokens, the hidden states, and the selection if it is its own."""
        hidden, taken = given if len(given) == 2 else (*given, None)
        out, selection = model.model.mtp.rows(x, hidden, span, angles, cache[0], taken)
        own = [] if taken is not None or selection is None else [selection]
        return [model.head(out), out, *own]
