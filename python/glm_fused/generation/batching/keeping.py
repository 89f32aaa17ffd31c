"""What a scheduler keeps of its texts for others that begin alike, where it has a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mlx_lm.models.cache import CacheList

from ...environment import debug
from ...models.decoder import Model
from .filling import Prompt
from .rows import Row


class Store(Protocol):
    """Keeps caches of texts, for those that begin alike."""

    def take(self, tokens: Sequence[int]) -> tuple[list[CacheList], int]:
        """A cache of its own with the first of these tokens, and how many; maybe none."""
        ...

    def put(self, tokens: Sequence[int], cache: list[CacheList]) -> None:
        """Keep a copy of a cache, which has these tokens."""
        ...

    @property
    def nbytes(self) -> int:
        """The bytes of what is kept."""
        ...

    def describe(self) -> dict[str, Any]:
        """What it has, JSON-ready; ``limit_bytes`` is the most that it keeps in memory."""
        ...


class Keeping:
    """A store, or none.

    Attributes:
        wanted: whether anything is kept.
        failures: how often the store did not take a text.
    """

    def __init__(self, model: Model, store: Store | None):
        self._model, self._store = model, store
        self.wanted, self.failures = store is not None, 0

    @property
    def nbytes(self) -> int:
        """The bytes of what is kept."""
        return 0 if self._store is None else self._store.nbytes

    @property
    def limit_bytes(self) -> int:
        """The most that it may be."""
        limit: int = 0 if self._store is None else self._store.describe()["limit_bytes"]
        return limit

    def beginning(self, row: Row) -> Prompt:
        """A text with a cache of what is kept of its prompt; a prompt that is scored has none."""
        if self._store is None or len(row.known) == 1 or row.scores_prompt:
            return Prompt(row, self._model.make_cache(), 0)
        return Prompt(row, *self._store.take(row.known[:-1]))

    def keep(self, tokens: list[int], cache: list[CacheList]) -> None:
        """Keep a cache; the text itself is done, so what the store raises is only told."""
        if self._store is None:
            return
        try:
            self._store.put(tokens, cache)
        except Exception as error:
            self.failures += 1
            debug("a text of %d tokens is not kept: %s", len(tokens), error)

    def describe(self) -> dict[str, Any] | None:
        """What the store says of itself, JSON-ready."""
        return None if self._store is None else self._store.describe()
