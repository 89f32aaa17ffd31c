"""Chunks of prompts on their way to the MTP layer, which needs their hidden states."""

from __future__ import annotations

from collections import deque
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from ...models.decoder import Model
from ...models.pipeline import ask_for, turns_of


class Priming:
    """Has the layer take chunks, in a line of ranks some time after the model has.

    Their hidden states come back from the last rank, which is at the next chunks by then.
    """

    def __init__(self, model: Model):
        self._model, self._waiting = model, deque[tuple[mx.array, mx.array]]()

    def take(
        self, following: mx.array, hidden: mx.array, cache: CacheList, at_once: bool
    ) -> list[Any]:
        """Have ``cache`` get rows of tokens [b, l] and hidden states [b, l, hidden] before them.

        ``at_once``, as after the last chunk, or after some more. Returns what to evaluate.
        """
        ask_for(self._model, hidden, at_once)
        self._waiting.append((following, hidden))
        due = len(self._waiting) - (0 if at_once else turns_of(self._model) - 1)
        for _ in range(due):
            self._model.draft(*self._waiting.popleft(), cache)
        return [cache.state] if due > 0 else []
