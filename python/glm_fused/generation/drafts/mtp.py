"""Drafts from the model's own layer that predicts one token more (MTP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from ...models.cache import trim
from ...models.decoder import Model
from ...models.pipeline import has_mtp, of_first
from ...models.prompt_memory import MOST_WAITING
from ..limits import MTP
from .drafter import FEW_WAITING, Drafter, Draw, Kind
from .priming import Priming

_REVIEWED = 16  # tokens that are reviewed at a time


class MtpDrafter(Drafter):
    """Drafts each token from the one before it and the hidden state behind that.

    The layer's cache has a row for each known token but the first, made of the model's own hidden
    states: what was missing is appended before a draft. Drafts after the first go on from the
    layer's hidden states; the rows that this makes are forgotten at once. Where there are no drafts
    for long, rows are appended all the same, so that few hidden states are kept.
    """

    needs_hidden = True

    def __init__(self, model: Model):
        if not has_mtp(model):
            raise ValueError("[drafts] the model has no MTP layer; load it with mtp=True.")
        self._model, self._cache = model, model.make_mtp_cache()
        self._prompt, self._priming = list[int](), Priming(model)
        self._tokens: list[int] = []  # those without a row
        self._hidden: list[mx.array] = []  # and the states that belong to them, [1, l, hidden]

    def start(self, prompt: Sequence[int], cached: int = 0) -> None:
        # The layer sees what the model computes now: rows are relative to one another, so that a
        # text may begin anywhere.
        self._prompt = list(prompt[cached + 1 :])

    def prime(self, hidden: mx.array) -> list[Any]:
        length = hidden.shape[1]
        tokens, self._prompt = self._prompt[:length], self._prompt[length:]
        following = mx.array([tokens], mx.uint32)
        return self._priming.take(following, hidden, self._cache, at_once=not self._prompt)

    def extend(self, tokens: Sequence[int], hidden: mx.array | None) -> None:
        assert hidden is not None
        self._tokens.extend(tokens)
        self._hidden.append(hidden)
        if len(self._tokens) > MOST_WAITING:
            self._append(len(self._tokens))
            mx.async_eval([entry.keys for entry in self._cache.caches])

    def kinds(self) -> list[Kind]:
        return [Kind(MTP)] if self._tokens else []

    def lacking(self, kind: Kind) -> int:
        return len(self._tokens)

    def reviewable(self) -> tuple[Kind, int] | None:
        waiting = len(self._tokens)
        return (Kind(MTP), waiting) if waiting > _REVIEWED else None

    def review(self) -> list[bool]:
        if before := len(self._tokens) - 1 - _REVIEWED:
            self._append(before)
        following = self._tokens[1:]
        logits, _, _ = self._append(_REVIEWED)
        likeliest = of_first(self._model, mx.argmax(logits[0], axis=-1))
        return [a == b for a, b in zip(_listed(likeliest), following, strict=True)]

    def catch_up(self, kind: Kind) -> list[Any]:
        if len(self._tokens) <= FEW_WAITING:
            return []
        self._append(len(self._tokens) - 1)
        return [self._cache.state]

    def propose(self, kind: Kind, depth: int, draw: Draw) -> mx.array:
        # In powers of two, since each number of rows is a step of its own to record.
        while len(self._tokens) & (len(self._tokens) - 1):
            self._append(1 << (len(self._tokens).bit_length() - 1))
        logits, hidden, selection = self._append(len(self._tokens))
        drafts: list[mx.array] = []
        while True:
            token = draw(logits[:, -1], drafts)
            drafts.append(token)
            if len(drafts) == depth:
                break
            last = hidden[:, -1:]
            logits, hidden, selection = self._model.draft(token[None], last, self._cache, selection)
        trim(self._cache, depth - 1)
        return of_first(self._model, mx.concatenate(drafts))

    def _append(self, count: int) -> tuple[mx.array, mx.array, mx.array | None]:
        """What the layer gives for the first so many of the tokens that had no row."""
        hidden = mx.concatenate(self._hidden, axis=1)
        tokens, self._tokens = mx.array([self._tokens[:count]], mx.uint32), self._tokens[count:]
        self._hidden = [hidden[:, count:]] if self._tokens else []
        return self._model.draft(tokens, hidden[:, :count], self._cache)


def _listed(tokens: mx.array) -> list[int]:
    return cast(list[int], tokens.tolist())
