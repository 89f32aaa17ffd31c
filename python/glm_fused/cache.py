"""Caches in mlx-lm's own types, and which cached keys each query may see.

A layer's cache is a ``CacheList``: [0] holds the latents (keys [b, 1, t, kv_lora_rank], values
[b, 1, t, rope]); a full layer's [1] holds the indexer keys [b, 1, t, index_head_dim] with values of
zero width. A shared layer has no [1].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import CacheList, KVCache

from .config import ModelArgs


def make_cache(args: ModelArgs) -> list[CacheList]:
    return [
        CacheList(KVCache(), KVCache()) if args.is_full(i) else CacheList(KVCache())
        for i in range(args.num_hidden_layers)
    ]


def check_cache(cache: Sequence[Any], args: ModelArgs) -> None:
    """Refuse caches of another model, as a prompt cache read from a file may be."""
    if len(cache) != args.num_hidden_layers:
        raise ValueError(
            f"[cache] expected one entry per layer ({args.num_hidden_layers}), got {len(cache)}."
        )
    for i, layer in enumerate(cache):
        found = len(getattr(layer, "caches", ()))
        expected = 2 if args.is_full(i) else 1
        if found != expected:
            raise ValueError(
                f"[cache] layer {i} is {(args.indexer_types or [])[i]!r} and needs a CacheList of "
                f"{expected}, got {type(layer).__name__} of {found}."
            )


def append_indexer_keys(cache: Any, keys: mx.array) -> mx.array:
    """Append ``keys`` [b, 1, l, d] and return all, [b, 1, t, d]."""
    keys, _ = cache.update_and_fetch(keys, keys[..., :0])
    # Nothing reads the zero-width values, so their updates would pile up unevaluated.
    cache.values = mx.zeros(cache.values.shape, cache.values.dtype)
    return keys


class Span(NamedTuple):
    """The queries of one forward: columns first .. first + length - 1 of the cached keys.

    ``start`` [b] is each row's first real column where a batch is left-padded.
    """

    first: int
    length: int
    start: mx.array | None = None

    @classmethod
    def of(cls, cache: Sequence[Any] | None, length: int) -> "Span":
        """The span that the next ``length`` tokens will take; call before updating the cache."""
        if cache is None:
            return cls(0, length)
        latents = cache[0][0]
        # A batch cache's offset counts from each row's first token, its size from column 0.
        return cls(latents.size(), length, getattr(latents, "left_padding", None))

    @property
    def total(self) -> int:
        """Cached keys after this forward, t."""
        return self.first + self.length

    def positions(self) -> mx.array:
        """Token positions [b or 1, l]; those of padding are negative."""
        columns = mx.arange(self.first, self.total)[None]
        return columns if self.start is None else columns - self.start[:, None]

    def allows(self, columns: mx.array, lo: int, hi: int) -> mx.array | None:
        """Whether queries lo..hi - 1 may see ``columns`` [b or 1, hi - lo or 1, n]: causal, not
        padding. None where every column of the cache is visible."""
        if self.length == 1 and self.start is None:
            return None
        queries = mx.arange(self.first + lo, self.first + hi)[None, :, None]
        allowed = columns <= queries
        if self.start is not None:
            allowed = allowed & (columns >= self.start[:, None, None])
        return allowed

    def mask(self, lo: int, hi: int) -> mx.array | None:
        """``allows`` for all cached keys: [b or 1, hi - lo, t]."""
        return self.allows(mx.arange(self.total)[None, None], lo, hi)
