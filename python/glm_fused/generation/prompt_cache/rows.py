"""Rows of caches as bytes: what is kept of a run of tokens, in memory and in files.

All layers' rows of a kind lie in one array, so a block of tokens takes a few arrays, where a cache
has some for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, KVCache

from ...formats.kv_rows import FLOATS, PACKED, format_of
from ...host import to_numpy
from ...models.cache import size_of
from ...models.cache_check import check_cache
from ...models.config import ModelArgs
from ...models.decoder import Model
from ...models.layer_spec import INDEX_KEY

LATENTS, ROPE, INDEX_KEYS = "latents", "rope", "index_keys"
# NumPy has no bfloat16, so rows are in the unsigned integers of their size.
_CARRIERS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


class Rows(NamedTuple):
    """What caches have of consecutive tokens.

    Attributes:
        kv_format: of the rows; one of `glm_fused.formats.kv_rows` but ``auto``.
        parts: unsigned integers [layers, tokens, width] by name.
    """

    kv_format: str
    parts: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


class Piece(NamedTuple):
    """The first ``tokens`` of the tokens that ``rows`` are of."""

    rows: Rows
    tokens: int


def checked(
    args: ModelArgs, cache: Sequence[CacheList], kv_format: str | None
) -> tuple[int, str | None]:
    """How many rows a cache has, and their format: ``kv_format``, or any where that is None.

    Raises ValueError, naming the layer, for a cache that is not of such a model, of a batch, or in
    another format.
    """
    check_cache(cache, args, 1, args.layers)
    entry = cache[0][0]
    if type(entry) is not KVCache:
        raise ValueError(f"[prompts] found a {type(entry).__name__}, expected a KVCache.")
    if entry.keys is not None:
        found = format_of(entry.keys.dtype)
        kv_format = kv_format or found
        if found != kv_format:
            raise ValueError(f"[prompts] a cache in {found}, expected {kv_format}.")
    return size_of(entry), kv_format


def cut(cache: Sequence[CacheList], first: int, last: int) -> Rows:
    """A copy of the rows of tokens ``first`` to ``last - 1`` of a text, which a cache holds."""
    groups = {
        LATENTS: [layer[0].keys for layer in cache],
        ROPE: [layer[0].values for layer in cache],
        INDEX_KEYS: [layer[1].keys for layer in cache if len(layer.caches) > 1],
    }
    parts = {}
    for name, arrays in groups.items():
        if arrays and arrays[0].shape[-1]:
            rows = mx.stack([array[0, 0, first:last] for array in arrays])
            parts[name] = to_numpy(rows.view(_CARRIERS[rows.dtype.size]))
    return Rows(format_of(cache[0][0].keys.dtype), parts)


def join(model: Model, pieces: Sequence[Piece]) -> list[CacheList]:
    """A cache of a model with the rows of pieces, one by one."""
    if not pieces:
        return model.make_cache()
    caches, full = [], 0
    dtype = (FLOATS | PACKED)[pieces[0].rows.kv_format]

    def column(name: str, layer: int) -> mx.array:
        rows = [rows.parts[name][layer, :n] for rows, n in pieces]
        return mx.array(np.concatenate(rows))[None, None].view(dtype)

    has_rope = ROPE in pieces[0].rows.parts
    for i, spec in enumerate(model.args.layers):
        entries = [_entry(column(LATENTS, i), column(ROPE, i) if has_rope else None)]
        if INDEX_KEY in spec.cache:
            entries.append(_entry(column(INDEX_KEYS, full), None))
            full += 1
        caches.append(CacheList(*entries))
    return caches


def _entry(keys: mx.array, values: mx.array | None) -> Any:
    """A cache that is full: the first token more makes it grow."""
    if values is None:
        values = mx.zeros((*keys.shape[:3], 0), keys.dtype)
    mx.eval(keys, values)
    return KVCache.from_state((keys, values, keys.shape[2]))
