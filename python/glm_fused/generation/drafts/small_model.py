"""Drafts from a small model of the same vocabulary, as mlx-lm loads it."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from .drafter import Drafter, Draw, Kind

_CHUNK = 512  # tokens of a prompt at a time


class ModelDrafter(Drafter):
    """Drafts as the small model goes on, whose cache has the known tokens but the last ones.

    Args:
        model: follows mlx-lm's protocol.
        vocabulary: how many tokens drafts may be of.

    Raises ValueError for a model whose cache cannot forget.
    """

    def __init__(self, model: nn.Module, vocabulary: int):
        self._model, self._vocabulary = model, vocabulary
        self._cache = make_prompt_cache(model)
        if not can_trim_prompt_cache(self._cache):
            raise ValueError("[drafts] the draft model's cache cannot forget what was not kept.")
        self._tokens: list[int] = []  # those that the cache lacks

    def start(self, prompt: Sequence[int], cached: int = 0) -> None:
        self._tokens = list(prompt)

    def extend(self, tokens: Sequence[int], hidden: mx.array | None) -> None:
        self._tokens.extend(tokens)

    def kinds(self) -> list[Kind]:
        return [Kind("model")]

    def propose(self, kind: Kind, depth: int, draw: Draw) -> mx.array:
        while len(self._tokens) > _CHUNK:
            self._model(mx.array([self._tokens[:_CHUNK]]), cache=self._cache)
            mx.eval([layer.state for layer in self._cache])
            del self._tokens[:_CHUNK]
        tokens, self._tokens = mx.array([self._tokens], mx.uint32), []
        drafts: list[mx.array] = []
        while len(drafts) < depth:
            logits = self._model(tokens, cache=self._cache)[:, -1, : self._vocabulary]
            token = draw(logits, drafts)
            drafts.append(token)
            tokens = token[None]
        trim_prompt_cache(self._cache, depth - 1)
        return mx.concatenate(drafts)
