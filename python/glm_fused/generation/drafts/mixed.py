"""Drafts of several drafters, of which the one that pays most is asked each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .drafter import Drafter, Draw, Kind


class MixedDrafter(Drafter):
    """All kinds of draft of all its drafters; the first ones come first."""

    needs_hidden = True

    def __init__(self, drafters: Sequence[Drafter]):
        self._drafters = list(drafters)

    def start(self, prompt: Sequence[int], cached: int = 0) -> None:
        for drafter in self._drafters:
            drafter.start(prompt, cached)

    def prime(self, hidden: mx.array) -> list[Any]:
        return [array for drafter in self._drafters for array in drafter.prime(hidden)]

    def kinds(self) -> list[Kind]:
        return [kind for drafter in self._drafters for kind in drafter.kinds()]

    def unmade(self, token: int) -> list[tuple[Kind, bool]]:
        found = []
        for drafter in self._drafters:
            found += drafter.unmade(token)
        return found

    def lacking(self, kind: Kind) -> int:
        return self._of(kind).lacking(kind)

    def reviewable(self) -> tuple[Kind, int] | None:
        for drafter in self._drafters:
            if (found := drafter.reviewable()) is not None:
                return found
        return None

    def review(self) -> list[bool]:
        return next(d for d in self._drafters if d.reviewable() is not None).review()

    def catch_up(self, kind: Kind) -> list[Any]:
        return self._of(kind).catch_up(kind)

    def propose(self, kind: Kind, depth: int, draw: Draw) -> mx.array:
        return self._of(kind).propose(kind, depth, draw)

    def _of(self, kind: Kind) -> Drafter:
        return next(drafter for drafter in self._drafters if kind in drafter.kinds())

    def extend(self, tokens: Sequence[int], hidden: mx.array | None) -> None:
        for drafter in self._drafters:
            drafter.extend(tokens, hidden)
