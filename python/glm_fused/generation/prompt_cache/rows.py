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
from ...models.layer_spec import INDEX_KEY, LayerSpec

DRAFT = "draft_"  # begins the names of the MTP layer's parts
LATENTS, ROPE, INDEX_KEYS = "latents", "rope", "index_keys"
# NumPy has no bfloat16, so rows are in the unsigned integers of their size.
_CARRIERS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


class Rows(NamedTuple):
    """What caches have of consecutive tokens.

    Attributes:
        kv_format: of the rows; one of `glm_fused.formats.kv_rows` but ``auto``.
        parts: unsigned integers [layers, tokens, width] by name. Those of the MTP layer may be of
            fewer tokens: of the first ones. Of a token they are the row that the token was needed
            for, which is that of the position before it; the first token of a text has zeros.
    """

    kv_format: str
    parts: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def drafted(self) -> int:
        """Of how many tokens there are rows of the MTP layer."""
        part = self.parts.get(DRAFT + LATENTS)
        return 0 if part is None else part.shape[1]


class Piece(NamedTuple):
    """The first ``tokens`` of the tokens that ``rows`` are of."""

    rows: Rows
    tokens: int

    @property
    def drafted(self) -> int:
        """Of how many of them there are rows of the MTP layer."""
        return min(self.tokens, self.rows.drafted)


class Prefix(NamedTuple):
    """Caches of the first tokens of a text, which the caller owns.

    ``cache`` has ``tokens`` rows, and ``draft`` the MTP layer's first ``drafted`` rows, at most one
    fewer than tokens: a row needs the token after its position. ``draft`` is None for a model
    without the layer, and where it was not asked for.
    """

    cache: list[CacheList]
    tokens: int
    draft: CacheList | None
    drafted: int


def checked(
    args: ModelArgs,
    cache: Sequence[CacheList],
    draft: CacheList | None,
    kv_format: str | None,
) -> tuple[int, str | None]:
    """How many rows a cache has, and their format: ``kv_format``, or any where that is None.

    Raises ValueError, naming the layer, for a cache that is not of such a model, of a batch, or in
    another format.
    """
    check_cache(cache, args, 1, args.layers)
    if draft is not None:
        check_cache([draft], args, 1, args.mtp_layers[:1])
    for entry in (cache[0][0], *([] if draft is None else [draft[0]])):
        if type(entry) is not KVCache:
            raise ValueError(f"[prompts] found a {type(entry).__name__}, expected a KVCache.")
        if entry.keys is not None:
            found = format_of(entry.keys.dtype)
            kv_format = kv_format or found
            if found != kv_format:
                raise ValueError(f"[prompts] a cache in {found}, expected {kv_format}.")
    return size_of(cache[0][0]), kv_format


def cut(cache: Sequence[CacheList], draft: CacheList | None, first: int, last: int) -> Rows:
    """A copy of the rows of tokens ``first`` to ``last - 1`` of a text, which the caches hold.

    ``draft`` is the MTP layer's cache, which may lack rows at its end. Both are of one text, not of
    a batch.
    """
    parts = _cut("", cache, first, last)
    if draft is not None and (size := size_of(draft[0])):
        last = min(last, size + 1)
        if first < last:
            parts |= _cut(DRAFT, [draft], first - 1, last - 1)
    return Rows(format_of(cache[0][0].keys.dtype), parts)


def _cut(prefix: str, layers: Sequence[CacheList], first: int, last: int) -> dict[str, np.ndarray]:
    groups = {
        LATENTS: [layer[0].keys for layer in layers],
        ROPE: [layer[0].values for layer in layers],
        INDEX_KEYS: [layer[1].keys for layer in layers if len(layer.caches) > 1],
    }
    parts = {}
    for name, arrays in groups.items():
        if arrays and arrays[0].shape[-1]:
            rows = mx.stack([array[0, 0, max(first, 0) : last] for array in arrays])
            part = to_numpy(rows.view(_CARRIERS[rows.dtype.size]))
            parts[prefix + name] = np.pad(part, ((0, 0), (max(-first, 0), 0), (0, 0)))
    return parts


def join(model: Model, pieces: Sequence[Piece], draft: bool) -> Prefix:
    """Caches of a model with the rows of pieces, one by one, and with ``draft`` the MTP layer's.

    That has rows up to the first piece that lacks some.
    """
    args = model.args
    counted = [(piece.rows, piece.tokens) for piece in pieces]
    cache = _join("", args.layers, counted, 0) if pieces else model.make_cache()
    tokens = sum(piece.tokens for piece in pieces)
    if not draft or not args.has_mtp:
        return Prefix(cache, tokens, None, 0)
    drafted = []
    for piece in pieces:
        drafted += [(piece.rows, piece.drafted)] if piece.drafted else []
        if piece.drafted < piece.tokens:
            break
    rows = sum(count for _, count in drafted) - 1  # the first token's is none
    if rows < 1:
        return Prefix(cache, tokens, model.make_mtp_cache(), 0)
    (made,) = _join(DRAFT, args.mtp_layers[:1], drafted, 1)
    return Prefix(cache, tokens, made, rows)


def _join(
    prefix: str, specs: Sequence[LayerSpec], counted: Sequence[tuple[Rows, int]], skipped: int
) -> list[CacheList]:
    """Caches of layers with the first tokens of rows, each with its number, but the very first."""
    caches, full = [], 0
    dtype = (FLOATS | PACKED)[counted[0][0].kv_format]

    def column(name: str, layer: int) -> mx.array:
        rows = [rows.parts[prefix + name][layer, :n] for rows, n in counted]
        return mx.array(np.concatenate(rows)[skipped:])[None, None].view(dtype)

    for i, spec in enumerate(specs):
        latents = column(LATENTS, i)
        has_rope = prefix + ROPE in counted[0][0].parts
        entries = [_entry(latents, column(ROPE, i) if has_rope else None)]
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
