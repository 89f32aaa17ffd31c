"""Drafts from the model's own layer that predicts one token more (MTP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ...models.cache import trim
from ...models.decoder import Model
from .drafter import Draft, Drafter, Draw


class MtpDrafter(Drafter):
    """Drafts each token from the one before it and the hidden state behind that.

    The layer's cache has a row for each known token but the first, made of the model's own hidden
    states: what was missing is appended before a draft. Drafts after the first go on from the
    layer's hidden states; the rows that this makes are forgotten at once.
    """

    needs_hidden = True

    def __init__(self, model: Model):
        if not model.args.has_mtp:
            raise ValueError("[drafts] the model has no MTP layer; load it with mtp=True.")
        self._model, self._cache = model, model.make_mtp_cache()
        self._prompt: list[int] = []
        self._tokens: list[int] = []  # those without a row
        self._hidden: list[mx.array] = []  # and the states that belong to them, [1, l, hidden]

    def start(self, prompt: Sequence[int]) -> None:
        self._prompt = list(prompt[1:])

    def prime(self, hidden: mx.array) -> list[Any]:
        length = hidden.shape[1]
        tokens, self._prompt = self._prompt[:length], self._prompt[length:]
        self._model.draft(mx.array([tokens], mx.uint32), hidden, self._cache)
        return [self._cache.state]

    def extend(self, tokens: Sequence[int], hidden: mx.array | None) -> None:
        assert hidden is not None
        self._tokens.extend(tokens)
        self._hidden.append(hidden)

    def kind(self) -> int | None:
        return 0 if self._tokens else None

    def propose(self, depth: int, draw: Draw) -> Draft:
        tokens, hidden = mx.array([self._tokens], mx.uint32), mx.concatenate(self._hidden, axis=1)
        self._tokens, self._hidden = [], []
        selection = None
        drafts: list[mx.array] = []
        probs: list[mx.array] = []
        while len(drafts) < depth:
            step = self._model.draft(tokens, hidden[:, -tokens.shape[1] :], self._cache, selection)
            logits, hidden, selection = step
            token, drawn_from = draw(logits[:, -1], drafts)
            drafts.append(token)
            probs += [] if drawn_from is None else [drawn_from]
            tokens = token[None]
        trim(self._cache, depth - 1)
        return Draft(mx.concatenate(drafts), mx.concatenate(probs) if probs else None)
