"""The model whose routed experts are streamed, as mlx-lm and everyone else calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from .. import _ext
from ..models.config import ModelArgs
from ..models.decoder import Model
from .banks import Streaming
from .experts import reads_for


class StreamedModel(Model):
    """A `Model` that raises where an expert could not be read for what it computed.

    Attributes:
        streaming: plan, source and banks of its experts, once `attach_banks` has given it any.
    """

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self.streaming: Streaming | None = None

    @property
    def context(self) -> int:
        """How many tokens memory is planned for, within the model's own context."""
        limit = super().context
        return limit if self.streaming is None else min(limit, self.streaming.plan.context)

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights in memory, with those of all slots."""
        slots = 0 if self.streaming is None else self.streaming.plan.slot_bytes
        return super().weight_bytes + slots

    def forward_states(
        self, tokens: mx.array, cache: Sequence[Any] | None, trace: list[mx.array] | None
    ) -> tuple[mx.array, mx.array]:
        """Logits and hidden states, whose evaluation raises RuntimeError after a failed read.

        Raises RuntimeError at once for a ``cache`` that an earlier read failed for.
        """
        with reads_for(cache) as reads:
            logits, hidden = super().forward_states(tokens, cache, trace)
            return _ext.slots_verify(reads, logits), _ext.slots_verify(reads, hidden)

    def forward_draft(
        self, tokens: mx.array, hidden: mx.array, cache: CacheList, selection: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """A draft, whose evaluation raises RuntimeError after a failed read, as above."""
        with reads_for([cache]) as reads:
            logits, hidden, selection = super().forward_draft(tokens, hidden, cache, selection)
            return _ext.slots_verify(reads, logits), _ext.slots_verify(reads, hidden), selection


def streaming_of(model: Model) -> Streaming | None:
    """How the experts of ``model`` are streamed; None where they are all in memory."""
    return model.streaming if isinstance(model, StreamedModel) else None
