"""The model whose routed experts are streamed, as mlx-lm and everyone else calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from .. import _ext
from ..models.config import ModelArgs
from ..models.decoder import Model
from ..models.pipeline import StagedModel
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

    def forward(
        self, tokens: mx.array, cache: Sequence[Any] | None, trace: list[mx.array] | None
    ) -> list[mx.array]:
        """Logits and hidden states, whose evaluation raises RuntimeError after a failed read.

        Raises RuntimeError at once for a ``cache`` that an earlier read failed for.
        """
        with reads_for(cache) as reads:
            return [_ext.slots_verify(reads, a) for a in super().forward(tokens, cache, trace)]

    def forward_draft(
        self, tokens: mx.array, given: Sequence[mx.array], cache: CacheList
    ) -> list[mx.array]:
        """A draft, whose evaluation raises RuntimeError after a failed read, as above."""
        with reads_for([cache]) as reads:
            found = super().forward_draft(tokens, given, cache)
            return [_ext.slots_verify(reads, array) for array in found]


class StreamedStage(StreamedModel, StagedModel):
    """A `StagedModel` that streams the experts of this rank's layers."""


def streaming_of(model: Model) -> Streaming | None:
    """How the experts of ``model`` are streamed; None where they are all in memory."""
    return model.streaming if isinstance(model, StreamedModel) else None
