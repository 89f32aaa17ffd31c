"""Drafts for several texts at once, whose steps take equally many tokens of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx

from ...models.cache import trim
from ...models.decoder import Model
from ...models.pipeline import of_first
from ...models.prompt_memory import MOST_WAITING
from ...models.row_caches import joined, kept, padded
from ..limits import MTP
from .drafter import Drafter, Draw, Kind
from .priming import Priming


class RowDrafts(ABC):
    """A `Drafter` for several texts: some may have known tokens where others have drafts."""

    needs_hidden: ClassVar[bool] = False

    @abstractmethod
    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin the texts with the tokens of their prompts."""

    def prime(self, following: mx.array, hidden: mx.array, at_once: bool) -> list[Any]:
        """Take the hidden states [b, l, hidden] of columns of the prompts.

        ``following`` [b, l] are the tokens after those. Returns what to evaluate. They are needed
        ``at_once`` where they are the last ones, or evaluated.
        """
        return []

    @abstractmethod
    def kinds(self) -> list[Kind]:
        """As a `Drafter` has them; those of any of the texts count together."""

    @abstractmethod
    def propose(self, ahead: Sequence[list[int]], depth: int, draws: Sequence[Draw]) -> mx.array:
        """What a step takes after the first token of each text, uint32 [b, depth].

        It is what is known ``ahead`` of that token, then drafts.
        """

    @abstractmethod
    def extend(
        self,
        new: Sequence[list[int]],
        following: Sequence[list[int]],
        hidden: mx.array | None,
    ) -> None:
        """The texts go on with ``new`` tokens, each with its own number of them.

        A step was made whose first columns stay, as many as each text has ``following`` tokens,
        those after the columns; ``hidden`` [b, l, hidden] are the states of all that it made, which
        are right as far as the text's known tokens go.
        """

    @abstractmethod
    def filter(self, stay: Sequence[int]) -> None:
        """Only these texts go on."""

    @abstractmethod
    def join(self, others: RowDrafts) -> None:
        """Texts of which ``others``, of the same class, have taken the prompts go on beside these.

        ``others`` are not used again.
        """


class EachRow(RowDrafts):
    """A drafter of its own for each text."""

    def __init__(self, drafters: Sequence[Drafter]):
        self._drafters = list(drafters)

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        for drafter, prompt in zip(self._drafters, prompts, strict=True):
            drafter.start(prompt)

    def kinds(self) -> list[Kind]:
        kinds = [kind for drafter in self._drafters for kind in drafter.kinds()]
        return [Kind(kinds[0].source)] if kinds else []

    def propose(self, ahead: Sequence[list[int]], depth: int, draws: Sequence[Draw]) -> mx.array:
        rows = []
        for drafter, known, draw in zip(self._drafters, ahead, draws, strict=True):
            parts = [mx.array(known, mx.uint32)]
            missing = depth - len(known)
            kinds = drafter.kinds()
            if missing and not kinds:
                parts.append(mx.zeros((missing,), mx.uint32))
            elif missing:
                parts.append(drafter.propose(kinds[0], missing, draw))
            rows.append(mx.concatenate(parts))
        return mx.stack(rows)

    def extend(
        self,
        new: Sequence[list[int]],
        following: Sequence[list[int]],
        hidden: mx.array | None,
    ) -> None:
        for drafter, tokens in zip(self._drafters, new, strict=True):
            drafter.extend(tokens, None)

    def filter(self, stay: Sequence[int]) -> None:
        self._drafters = [self._drafters[i] for i in stay]

    def join(self, others: RowDrafts) -> None:
        assert isinstance(others, EachRow)
        self._drafters += others._drafters


class MtpRows(RowDrafts):
    """Drafts of the MTP layer, as `MtpDrafter` makes them, with one cache for all texts.

    Where a text knows the token that others draft, it takes that and the hidden state behind it.
    Of a text whose cache began with tokens from elsewhere the layer's cache lacks those: it drafts
    from what came after them.
    """

    needs_hidden = True

    def __init__(self, model: Model, padding: Sequence[int]):
        self._model, self._priming = model, Priming(model)
        self._cache = padded(model.make_mtp_cache(), padding)
        self._following: list[list[int]] = [[] for _ in padding]  # tokens without a row
        self._hidden: list[mx.array] = []  # and the states that belong to them, [b, l, hidden]
        self._ahead: mx.array | None = None  # the states of known tokens beyond those

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """The prompts' tokens come with their hidden states."""

    def prime(self, following: mx.array, hidden: mx.array, at_once: bool) -> list[Any]:
        return self._priming.take(following, hidden, self._cache, at_once)

    def kinds(self) -> list[Kind]:
        return [Kind(MTP)] if self._hidden else []

    def propose(self, ahead: Sequence[list[int]], depth: int, draws: Sequence[Draw]) -> mx.array:
        logits, hidden, selection = self._append()
        rows: list[list[mx.array]] = [[] for _ in ahead]
        for place in range(depth):
            if place:
                last = self._behind(place - 1, list(map(len, ahead)), hidden[:, -1:])
                tokens = mx.stack([row[-1] for row in rows])
                logits, hidden, selection = self._model.draft(tokens, last, self._cache, selection)
            for i, known in enumerate(ahead):
                if place < len(known):
                    rows[i].append(mx.array(known[place : place + 1], mx.uint32))
                    continue
                rows[i].append(draws[i](logits[i, -1:], rows[i][len(known) :]))
        trim(self._cache, depth - 1)
        return of_first(self._model, mx.stack([mx.concatenate(row) for row in rows]))

    def _append(self) -> tuple[mx.array, mx.array, mx.array | None]:
        """What the layer gives for the tokens that had no row."""
        tokens, hidden = mx.array(self._following, mx.uint32), mx.concatenate(self._hidden, axis=1)
        self._following, self._hidden = [[] for _ in self._following], []
        return self._model.draft(tokens, hidden, self._cache)

    def _behind(self, place: int, known: Sequence[int], own: mx.array) -> mx.array:
        """The states [b, 1, hidden] behind the tokens at a place: the model's for known ones."""
        if self._ahead is None or not any(place < count for count in known):
            return own
        chosen = mx.array([place < count for count in known])[:, None, None]
        at = min(place, self._ahead.shape[1] - 1)
        return mx.where(chosen, self._ahead[:, at : at + 1], own)

    def extend(
        self,
        new: Sequence[list[int]],
        following: Sequence[list[int]],
        hidden: mx.array | None,
    ) -> None:
        assert hidden is not None
        columns = len(following[0])
        self._following = [a + b for a, b in zip(self._following, following, strict=True)]
        self._hidden.append(hidden[:, :columns])
        rest = hidden[:, columns:]
        if self._ahead is not None and self._ahead.shape[1] - columns > rest.shape[1]:
            rest = self._ahead[:, columns:]  # a step that took fewer tokens
        self._ahead = rest if rest.shape[1] else None
        if len(self._following[0]) > MOST_WAITING:
            self._append()
            mx.async_eval([entry.keys for entry in self._cache.caches])

    def filter(self, stay: Sequence[int]) -> None:
        rows = mx.array(list(stay))
        self._cache = kept(self._cache, stay)
        self._following = [self._following[i] for i in stay]
        self._hidden = [hidden[rows] for hidden in self._hidden]
        self._ahead = None if self._ahead is None else self._ahead[rows]

    def join(self, others: RowDrafts) -> None:
        assert isinstance(others, MtpRows)
        for each in (self, others):
            if each._hidden:
                each._append()
        self._cache = joined(self._cache, others._cache)
        self._following += others._following
        self._ahead = None
