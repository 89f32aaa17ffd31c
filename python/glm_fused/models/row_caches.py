"""Caches of several texts as one: texts join it, and leave it.

One text has a cache without padding, in mlx-lm's `KVCache`, whose steps are the quickest. Several
are padded on the left, in `BatchKVCache`, to as many columns as the longest has.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache

from .cache import size_of, trim


def padded(layer: CacheList, padding: Sequence[int]) -> CacheList:
    """An empty cache of a layer for texts with so much ``padding`` each, like an empty one."""
    if len(padding) == 1:
        return CacheList(*(KVCache() for _ in layer.caches))
    return CacheList(*(BatchKVCache(list(padding)) for _ in layer.caches))


def side_by_side(layers: Sequence[CacheList], padding: Sequence[int]) -> CacheList:
    """A layer's caches of single texts as one, where so many columns of padding each come next.

    Only a text that has nothing in its cache may have padding. None of them is used again.
    """
    if len(layers) == 1:
        return layers[0]
    if not any(size_of(layer.caches[0]) for layer in layers):
        return padded(layers[0], padding)
    both: CacheList = CacheList.merge(layers)
    for entry in both.caches:
        entry.left_padding += mx.array(list(padding))
        entry.offset -= mx.array(list(padding))
    mx.eval(both.state)
    return both


def joined(first: CacheList, second: CacheList) -> CacheList:
    """The texts of a layer's cache and, after them, those of another, which is not used again."""
    if not is_batch(first) and not is_batch(second):
        both: CacheList = CacheList.merge([first, second])
    else:
        both, other = (
            each if is_batch(each) else CacheList.merge([each]) for each in (first, second)
        )
        both.extend(other)
    mx.eval(both.state)
    return both


def kept(layer: CacheList, stay: Sequence[int]) -> CacheList:
    """A layer's cache with these texts alone, at least one, of several."""
    if len(stay) == 1:
        alone: CacheList = layer.extract(stay[0])
        mx.eval(alone.state)
        return alone
    layer.filter(mx.array(list(stay)))
    mx.eval(layer.state)
    return layer


def first_columns(layer: CacheList, row: int, count: int) -> CacheList:
    """A cache of its own of the first ``count`` columns of a text, which has at least as many."""
    alone: CacheList = layer.extract(row) if is_batch(layer) else layer
    trim(alone, size_of(alone.caches[0]) - count)
    mx.eval(alone.state)
    return alone


def is_batch(layer: CacheList) -> bool:
    """Whether a layer's cache is one of several texts, or was."""
    return any(isinstance(entry, BatchKVCache) for entry in layer.caches)
