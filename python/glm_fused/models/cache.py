"""Caches in mlx-lm's own types, and which cached keys each query may see.

A layer's cache is a ``CacheList``: [0] holds the latents (keys [b, 1, t, kv_lora_rank], values
[b, 1, t, rope]); a full layer's [1] holds the indexer keys [b, 1, t, index_head_dim] with values of
zero width. A shared layer has no [1]. In a packed format (`glm_fused.formats.kv_rows`) the keys are
whole rows of bytes and all values have zero width, so mlx-lm trims, batches and saves them like any
other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache

from .. import _ext, ops
from ..formats.kv_rows import FLOATS, PACKED, format_of, pack, row_bytes, row_widths
from .config import ModelArgs
from .layer_spec import INDEX_KEY, LATENT, LayerSpec


def make_cache(args: ModelArgs) -> list[CacheList]:
    """An empty cache of the decoder: one entry per layer, in the form above."""
    return [empty_cache(spec) for spec in args.layers]


def empty_cache(layer: LayerSpec) -> CacheList:
    """An empty cache of one layer."""
    return CacheList(*(KVCache() for _ in layer.cache))


def trim(cache: Sequence[CacheList] | CacheList, n: int) -> None:
    """Forget the last ``n`` columns of a layer's cache, or of those of all layers.

    Batches count columns, padding among them. Raises ValueError for more than there are.
    """
    for layer in [cache] if isinstance(cache, CacheList) else cache:
        for entry in layer.caches:
            if not 0 <= n <= (filled := size_of(entry)):
                raise ValueError(f"[cache] cannot forget {n} columns, expected 0 to {filled}.")
            entry.trim(n)


def bytes_per_token(
    args: ModelArgs, kv_format: str = "bf16", layers: Sequence[LayerSpec] | None = None
) -> int:
    """The bytes that a token adds: latents and RoPE keys, and on full layers indexer keys.

    They are those of ``layers``, or of all that the model has.
    """
    entries = {
        LATENT: row_bytes(kv_format, args.kv_lora_rank, args.qk_rope_head_dim),
        INDEX_KEY: row_bytes(kv_format, args.index_head_dim, 0),
    }
    layers = args.model_layers if layers is None else layers
    return sum(entries[name] for spec in layers for name in spec.cache)


def append(
    cache: Any | None, values: mx.array, rope: mx.array | None, kv_format: str
) -> tuple[mx.array, mx.array | None]:
    """Append values [b, 1, l, r] and rope [b, 1, l, p] to ``cache``; returns all of its rows.

    The rows are float [b, t, r] and [b, t, p], or packed rows and None. A cache that is not empty
    keeps its own format; an empty one, or None, takes ``kv_format``.
    """
    if cache is not None and cache.keys is not None:
        kv_format = format_of(cache.keys.dtype)
    packed = kv_format in PACKED
    if kv_format in FLOATS:
        values = values.astype(FLOATS[kv_format])
        rope = None if rope is None else rope.astype(values.dtype)
    if cache is None:
        if packed:
            return pack(values, rope, kv_format)[:, 0], None
        return values[:, 0], None if rope is None else rope[:, 0]
    at, length = size_of(cache), values.shape[2]
    if cache.keys is None:
        batch, capacity = values.shape[0], _multiple(length, type(cache).step)
        widths = values.shape[-1], 0 if rope is None else rope.shape[-1]
        if packed:
            widths = row_widths(kv_format, *widths)
        dtype = PACKED.get(kv_format, values.dtype)
        cache.keys, cache.values = (_zeros(batch, capacity, w, dtype) for w in widths)
    make_room(cache, length)
    if packed:
        rows, rope = ops.append_packed(cache.keys, values, rope, at), None
    elif rope is None:
        rows = ops.append_rows(cache.keys, values, at)
    else:
        rows, rope = ops.append_pair(cache.keys, values, cache.values, rope, at)
    advance(cache, length)
    return rows, rope


def size_of(cache: Any) -> int:
    """How many columns of a cache are filled."""
    filled: int = cache._idx if isinstance(cache, BatchKVCache) else cache.offset
    return filled


def padding_of(cache: Any) -> list[mx.array]:
    """The padding [b] of a batch's rows; nothing where there is none, as in what is no cache."""
    try:
        return [cache[0].caches[0].left_padding]
    except (AttributeError, LookupError, TypeError):
        return []


def advance(cache: Any, length: int) -> None:
    """Count ``length`` new columns as filled."""
    cache.offset = cache.offset + length
    if isinstance(cache, BatchKVCache):
        cache._idx += length


def make_room(cache: Any, length: int) -> None:
    """Give a cache that is not empty room for ``length`` columns more.

    Growing copies a cache to a larger one: it has to be seldom, to cost little per token.
    """
    at = size_of(cache)
    if at + length <= cache.keys.shape[2]:
        return
    step = max(type(cache).step, at // 8)
    capacity = at + _multiple(length, step)
    cache.keys, cache.values = (
        _with_room(array, at, capacity) for array in (cache.keys, cache.values)
    )


def _with_room(array: mx.array, at: int, capacity: int) -> mx.array:
    """A larger array [b, 1, capacity, w] with the first ``at`` columns of another."""
    batch, _, _, width = array.shape
    larger = _zeros(batch, capacity, width, array.dtype)
    if width:
        ops.append_rows(larger, array[..., :at, :], 0)
    return larger


def _zeros(batch: int, capacity: int, width: int, dtype: mx.Dtype) -> mx.array:
    """Zeros [b, 1, capacity, w], for a CPU in huge pages."""
    if mx.default_device() == mx.cpu:
        return _ext.cache_buffer(batch, capacity, width, dtype)
    return mx.zeros((batch, 1, capacity, width), dtype)


def _multiple(n: int, unit: int) -> int:
    return -(-n // unit) * unit


class Span(NamedTuple):
    """The queries of one forward: columns ``first`` to ``first + length - 1`` of the cached keys.

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
        """How many keys are cached after this forward (t)."""
        return self.first + self.length

    def positions(self) -> mx.array:
        """Token positions [b or 1, l]; those of padding are negative."""
        columns = mx.arange(self.first, self.total)[None]
        return columns if self.start is None else columns - self.start[:, None]
