"""An indexer whose scores ranks share out among each other; what it selects is what one selects.

Of several new tokens each rank takes some, and scores them against all keys that they see: nothing
is to be merged. Of one token each rank takes some keys and chooses the best of those. The best of
all are among what the ranks chose. Every rank scores these itself, in the order of the cache, so
that equal scores and NaN are decided as one process decides them.

Where that takes longer than scoring everything, each rank does so. See `glm_fused.models.shard`.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from .. import ops
from ..ops import routes
from ..ops.routes import Kernel
from .cache import Span
from .indexer import Indexer
from .ranks import Cut, Ranks
from .sharded_layers import as_kind


class Price(NamedTuple):
    """What a gather costs, in multiply-adds of the scores that a rank could compute meanwhile."""

    gather: int
    value: int  # of 4 bytes


CPU = Price(1 << 22, 1 << 8)  # 100 µs and 1 GB/s, at some 50 billion a second
GPU = Price(1 << 28, 1 << 13)  # 30 µs and 5 GB/s, at 10,000 billion


def keys_pay(batch: int, total: int, topk: int, width: int, ranks: int) -> bool:
    """Whether ranks share out the keys that a token of each text is scored against.

    There are ``total`` of them, of which ``topk`` are chosen; a score has ``width`` multiply-adds.
    """
    spared = batch * (total - total // ranks - topk * ranks)
    return _pays(spared, batch, topk, width, ranks)


def pays(batch: int, length: int, total: int, topk: int, width: int, ranks: int) -> bool:
    """Whether ranks share out the scores of ``length`` tokens of each text against all keys."""
    if routes.choose("indexer_topk").kernel is Kernel.mlx:  # bits there may depend on sizes
        return False
    if length == 1:
        return keys_pay(batch, total, topk, width, ranks)
    part = -(-length // ranks)
    most = ops.blocks.MAX_TOKENS  # Metal takes more as a prompt, which has other bits
    spared, lists = batch * (length - part) * total, batch * part
    return (part > most) == (length > most) and _pays(spared, lists, topk, width, ranks)


def _pays(spared: int, lists: int, topk: int, width: int, ranks: int) -> bool:
    """Whether so many scores take longer than a gather of so many lists of each rank."""
    price = GPU if routes.has_metal(None) else CPU
    return spared * width > price.gather + price.value * lists * topk * ranks


class ShardedIndexer(Indexer):
    """An `Indexer` whose scores ranks share out among each other."""

    _ranks: Ranks

    @staticmethod
    def of(indexer: Indexer, ranks: Ranks) -> ShardedIndexer:
        """The indexer, of which every rank has all weights and keys."""
        made = as_kind(ShardedIndexer, indexer)
        assert isinstance(made, ShardedIndexer)
        made._ranks = ranks
        return made

    def select(self, q: mx.array, weights: mx.array, keys: mx.array, span: Span) -> mx.array:
        """As `Indexer`."""
        batch, length, *_ = q.shape
        width = self.heads * self.head_dim
        if not pays(batch, length, span.total, self.topk, width, self._ranks.size):
            return super().select(q, weights, keys, span)
        by = self._by_queries if length > 1 else self._by_keys
        return by(q, weights, keys, span)

    def _by_queries(self, q: mx.array, weights: mx.array, keys: mx.array, span: Span) -> mx.array:
        length = q.shape[1]
        cut = Cut.of(length, self._ranks.size)
        part = cut.part(self._ranks.rank)
        first = span.total - length + part.start
        end = first + cut.width
        own = Span(first, cut.width, span.start)
        selected = super().select(q[:, part], weights[:, part], keys[:, :end], own)
        return self._ranks.gather(selected, cut, axis=1)

    def _by_keys(self, q: mx.array, weights: mx.array, keys: mx.array, span: Span) -> mx.array:
        ranks, topk = self._ranks, self.topk
        bounds = Cut.of(span.total, ranks.size).bounds
        first, end = bounds[ranks.rank], bounds[ranks.rank + 1]
        start = None if span.start is None else mx.clip(span.start - first, 0, end - first)
        own = super().select(q, weights, keys[:, first:end], Span(end - first - 1, 1, start))
        own = mx.where(own < 0, own, own + first)
        found = ranks.gather(own, Cut.of(topk * ranks.size, ranks.size))
        # In the order of the cache: first the -1 of ranks that saw too few keys.
        found = mx.sort(found, axis=-1)
        rows = keys[mx.arange(q.shape[0])[:, None], found[:, 0]]
        missing = (found[:, 0] < 0).sum(axis=-1).astype(mx.int32)
        best = super().select(q, weights, rows, Span(found.shape[-1] - 1, 1, missing))
        chosen = mx.take_along_axis(found, mx.maximum(best, 0), axis=-1)
        return mx.where(best < 0, best, chosen)
