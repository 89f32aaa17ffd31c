"""Caches that go from one generation to the next, which then takes only the tokens that are new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mlx_lm.models.cache import CacheList

from ..models.cache import trim
from ..models.decoder import Model


class Caches(Protocol):
    """Where a generation takes its cache from, and leaves it."""

    def take(self, tokens: Sequence[int]) -> tuple[list[CacheList], int]:
        """A cache for the caller alone, and how many of the first ``tokens`` it has."""
        ...

    def put(self, tokens: Sequence[int], cache: list[CacheList]) -> None:
        """Keep a cache of ``tokens``, which the caller uses no more."""
        ...


class KeptCache:
    """The cache of one text that goes on, such as a conversation.

    It is cut where the next prompt differs from what it has, so it is never of other tokens. What
    is taken and not put back, because a generation failed, is not there the next time.

    Args:
        model: whose caches they are.
    """

    def __init__(self, model: Model):
        self._model = model
        self._tokens: list[int] = []
        self._cache: list[CacheList] | None = None

    @property
    def tokens(self) -> list[int]:
        """Those that the cache has."""
        return list(self._tokens)

    @property
    def nbytes(self) -> int:
        """The bytes that it has allocated, with room to grow."""
        return sum(layer.nbytes for layer in self._cache or ())

    def take(self, tokens: Sequence[int]) -> tuple[list[CacheList], int]:
        """The cache with the ``tokens`` that it shares, all but the last one at most."""
        cache, held = self._cache, self._tokens
        self._cache, self._tokens = None, []
        common = _common(held, tokens[:-1])
        if cache is None or not common:
            return self._model.make_cache(), 0
        trim(cache, len(held) - common)
        return cache, common

    def put(self, tokens: Sequence[int], cache: list[CacheList]) -> None:
        """Keep the cache of ``tokens``; raises ValueError where it has more or fewer."""
        if (found := cache[0].size()) != len(tokens):
            raise ValueError(f"[cache] the cache has {found} tokens, expected {len(tokens)}.")
        self._cache, self._tokens = cache, list(tokens)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
