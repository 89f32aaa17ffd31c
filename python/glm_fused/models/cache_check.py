"""Whether a cache belongs to a model: caches come from files, other models and other programs.

Every layer has to have the caches that ``make_cache`` gives it, of one length, batch and format.
The values in its rows cannot be checked, so a cache whose values were changed passes.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, CacheList, KVCache

from ..formats.kv_rows import FLOATS, PACKED, format_of, row_widths
from ..validation import show
from .config import ModelArgs
from .layer_spec import LayerSpec

_DTYPES = list((FLOATS | PACKED).values())
_NAMES = ("latents", "indexer keys")


class _Shared(NamedTuple):
    """What all caches have in common; ``batch`` is None in an empty one that takes any."""

    kind: type
    length: int
    batch: int | None
    dtype: mx.Dtype | None
    padding: list[int] | None


class _Passed(NamedTuple):
    """A cache that was checked: its arrays, and the length up to which they have room."""

    args: ModelArgs
    shared: _Shared
    room: int
    arrays: list[weakref.ref[mx.array]]
    empty: list[tuple[int, ...]]


# Caches that passed, by the first layer's first cache.
_passed: weakref.WeakKeyDictionary[Any, _Passed] = weakref.WeakKeyDictionary()


def check_cache(
    cache: Sequence[Any], args: ModelArgs, batch: int | None, layers: Sequence[LayerSpec]
) -> None:
    """Raise ValueError, naming the layer, for a cache that is not of these layers or not whole.

    For every one of ``layers`` it checks the number and type of the caches, how many tokens they
    hold, their shapes and types, and the padding of batches; ``batch`` is how many rows the tokens
    have. It is called at every step, so of arrays that passed before it checks the lengths alone.
    """
    if not isinstance(cache, Sequence) or len(cache) != len(layers):
        found = len(cache) if isinstance(cache, Sequence) else f"a {type(cache).__name__}"
        raise ValueError(f"[cache] expected one entry per layer ({len(layers)}), got {found}.")
    if _passed_before(cache, args, batch):
        return
    shared: _Shared | None = None
    for layer, spec in zip(cache, layers, strict=True):
        caches = layer.caches if type(layer) is CacheList else ()
        if len(caches) != len(spec.cache):
            _refuse_layer(layer, spec)
        for j, entry in enumerate(caches):
            shared = _check(entry, spec.index, j, args, shared, batch)
    if shared is not None and shared.dtype is not None:
        arrays, empty = _arrays(cache, shared)
        room, known = min(array.shape[2] for array in arrays), list(map(weakref.ref, arrays))
        _passed[cache[0].caches[0]] = _Passed(args, shared, room, known, empty)


def _passed_before(cache: Sequence[Any], args: ModelArgs, batch: int | None) -> bool:
    """Whether these are arrays that were checked for this model, however long they are by now.

    Growing, filtering, extending and loading, which change a cache's shape, type or padding, all
    give it new arrays of keys. Appending and trimming change its length alone.
    """
    try:
        entries = [entry for layer in cache for entry in layer.caches]
        passed = _passed.get(entries[0])
        if passed is None or passed.args is not args or batch not in (None, passed.shared.batch):
            return False
        batched = passed.shared.kind is BatchKVCache
        lengths = [entry._idx if batched else entry.offset for entry in entries]
        arrays, empty = _arrays(cache, passed.shared)
    except (AttributeError, LookupError, TypeError):  # entries of some other kind
        return False
    return (
        lengths.count(lengths[0]) == len(lengths)
        and set(map(type, lengths)) == {int}
        and 0 <= lengths[0] <= passed.room
        and len(arrays) == len(passed.arrays)
        and set(map(type, arrays)) == {mx.array}  # a reference to a freed array is None
        and all(map(operator.is_, arrays, [known() for known in passed.arrays]))
        and empty == passed.empty
    )


def _arrays(cache: Sequence[Any], shared: _Shared) -> tuple[list[mx.array], list[tuple[int, ...]]]:
    """The arrays that stay the same, and the shapes of values without width, which do not."""
    entries = [entry for layer in cache for entry in layer.caches]
    keys = [entry.keys for entry in entries]
    if shared.dtype in PACKED.values():
        return keys, [entry.values.shape for entry in entries]
    values = [layer.caches[0].values for layer in cache]
    return keys + values, [e.values.shape for layer in cache for e in layer.caches[1:]]


def _refuse_layer(layer: Any, spec: LayerSpec) -> NoReturn:
    found, expected = len(getattr(layer, "caches", ())), len(spec.cache)
    raise ValueError(
        f"[cache] layer {spec.index} is {spec.attention!r} and needs a CacheList of {expected}, got"
        f" {type(layer).__name__} of {found}."
    )


def _check(
    entry: Any, i: int, j: int, args: ModelArgs, shared: _Shared | None, batch: int | None
) -> _Shared:
    """Check one cache against the model and what the others had in common."""
    kind = type(entry)
    if kind not in (KVCache, BatchKVCache):
        _refuse(i, j, f"a {kind.__name__}", "a KVCache or BatchKVCache")
    length = getattr(entry, "_idx" if kind is BatchKVCache else "offset", None)
    if type(length) is not int or length < 0:
        _refuse(i, j, f"{_text(length)} tokens", "a number of tokens")
    rows, dtype = _check_arrays(entry, i, j, args, length)
    padding = _padding(entry, i, j) if kind is BatchKVCache else None
    if padding is not None and rows not in (None, len(padding)):
        _refuse(i, j, f"left_padding of {len(padding)} rows", f"{rows}")
    rows = len(padding) if padding is not None else rows
    found = _Shared(kind, length, rows, dtype, padding)
    if shared is None:
        shared = found._replace(batch=batch or found.batch)
    for name in ("kind", "length", "batch", "dtype", "padding"):
        a, b = getattr(found, name), getattr(shared, name)
        if a != b and not (name == "batch" and a is None):
            _refuse(i, j, f"{name} {_text(a)}", f"{_text(b)} as the first cache or the tokens have")
    return shared


def _check_arrays(
    entry: Any, i: int, j: int, args: ModelArgs, length: int
) -> tuple[int | None, mx.Dtype | None]:
    """The batch size and dtype of a cache's rows; None for both if it has none."""
    keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
    if keys is None and values is None:
        if length:
            _refuse(i, j, f"{length} tokens and no keys", "keys")
        return None, None
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        _refuse(i, j, f"keys {_text(keys)} and values {_text(values)}", "two arrays")
    if keys.dtype not in _DTYPES:
        expected = " or ".join(str(dtype) for dtype in _DTYPES)
        _refuse(i, j, f"keys of {keys.dtype}", expected)
    kv_format = format_of(keys.dtype)
    rank, rope = (args.index_head_dim, 0) if j else (args.kv_lora_rank, args.qk_rope_head_dim)
    widths = row_widths(kv_format, rank, rope)
    for name, array, width in (("keys", keys, widths[0]), ("values", values, widths[1])):
        known = array.ndim == 4 and array.shape[1:2] + array.shape[3:] == (1, width)
        if not known or array.shape[::2] != keys.shape[::2] or array.dtype != keys.dtype:
            expected = (
                f"{keys.dtype} [batch, 1, tokens, {width}], batch and tokens those of the keys"
            )
            _refuse(i, j, f"{name} {array.dtype} {list(array.shape)}", expected)
    if keys.shape[2] < length:
        _refuse(i, j, f"room for {keys.shape[2]} tokens", f"room for the {length} that it holds")
    return keys.shape[0], keys.dtype


def _padding(entry: Any, i: int, j: int) -> list[int]:
    array = getattr(entry, "left_padding", None)
    if isinstance(array, mx.array) and mx.issubdtype(array.dtype, mx.integer) and array.ndim == 1:
        padding = cast(list[int], array.tolist())
        if all(n >= 0 for n in padding):
            return padding
    return _refuse(i, j, f"left_padding {_text(array)}", "an integer of at least 0 for every row")


def _refuse(i: int, j: int, found: str, expected: str) -> NoReturn:
    raise ValueError(f"[cache] layer {i}, {_NAMES[j]}: found {found}, expected {expected}.")


def _text(value: object) -> str:
    if isinstance(value, mx.array):
        return f"an array of {value.dtype} {list(value.shape)}"
    return value.__name__ if isinstance(value, type) else show(value)
