"""Attention over long contexts: which cached keys a query attends to, and what they give."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from . import routes, stock
from .routes import Kernel, Stream
from .unfit import unfit


def append_rows(
    buffer: mx.array,
    rows: mx.array,
    at: int,
    *,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """Append rows to a growing cache, as ``buffer[..., at : at + l, :] = rows`` would.

    The rows are written to the buffer's own memory, whoever else holds it: all see the same rows
    before `at`. It is copied only where rows from `at` on may be another array's, as after a trim
    or in a copy of a cache. Rows of `buffer` after ``at + l`` are unspecified.

    Args:
        buffer: [b, 1, capacity, width], which becomes the array with the new rows.
        rows: [b, 1, l, width] of the buffer's dtype.
        at: the first row that is written, with ``at + l`` at most the capacity.
        reference: True or False overrides the current path; the reference is MLX's own update.
        stream: where to run; None: the default device.

    Returns:
        The buffer's first rows, [b, at + l, width].

    Raises:
        ValueError: a shape, dtype or `at` does not fit; the message names the argument.
    """
    kernel = routes.take("append_rows", stream=stream, reference=reference)
    if kernel is Kernel.mlx:
        with routes.on(stream):
            return stock.append_rows(buffer, rows, at)
    try:
        return _ext.append_rows(buffer, rows, at, kernel, stream)
    except TypeError:
        raise unfit("append_rows", buffer=buffer, rows=rows, at=at) from None


def append_pair(
    buffer: mx.array,
    rows: mx.array,
    other_buffer: mx.array,
    other_rows: mx.array,
    at: int,
    *,
    reference: bool | None = None,
    stream: Stream = None,
) -> tuple[mx.array, mx.array]:
    """`append_rows` of two caches of one dtype, in one launch on Metal.

    Args:
        buffer: [b, 1, capacity, width], as `append_rows` takes it.
        rows: [b, 1, l, width].
        other_buffer: of another width, and as many or other columns of capacity.
        other_rows: as many as `rows`, of the other width.
        at: the first row that is written, of both.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        The first ``at + l`` rows of both.

    Raises:
        ValueError: a shape, dtype or `at` does not fit; the message names the argument.
    """
    kernel = routes.take("append_rows", stream=stream, reference=reference)
    if kernel is not Kernel.metal:
        first = append_rows(buffer, rows, at, reference=reference, stream=stream)
        return first, append_rows(other_buffer, other_rows, at, reference=reference, stream=stream)
    try:
        return _ext.append_pair(buffer, rows, other_buffer, other_rows, at, kernel, stream)
    except TypeError:
        raise unfit("append_rows", buffer=buffer, rows=rows, at=at) from None


def append_packed(
    buffer: mx.array,
    values: mx.array,
    ropes: mx.array | None,
    at: int,
    *,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """`append_rows` of values that are packed to the format of the buffer's dtype, in one launch.

    Args:
        buffer: uint8 (fp8) or int8 [b, 1, capacity, bytes], rows of `glm_fused.formats.kv_rows`,
            which becomes the array with the new rows.
        values: float32, float16 or bfloat16 [b, 1, l, rank], of any strides.
        ropes: the same [b, 1, l, rope], or None where rows have no RoPE values.
        at: the first row that is written.
        reference: True or False overrides the current path; the reference is
            `glm_fused.formats.kv_rows.pack`, then MLX's own update.
        stream: where to run; None: the default device.

    Returns:
        The buffer's first rows, [b, at + l, bytes]. The codes of values that are not finite, or
        share a scale with such, may be any; they read as NaN.

    Raises:
        ValueError: a shape, dtype or `at` does not fit; the message names the argument.
    """
    kernel = routes.take("append_rows", stream=stream, reference=reference)
    if kernel is Kernel.mlx:
        with routes.on(stream):
            return stock.append_packed(buffer, values, ropes, at)
    try:
        return _ext.append_packed(buffer, values, ropes, at, kernel, stream)
    except TypeError:
        raise unfit("append_packed", buffer=buffer, values=values, at=at) from None


def indexer_topk(
    q: mx.array,
    keys: mx.array,
    weights: mx.array,
    k: int,
    *,
    scale: float,
    weight_scale: float = 1.0,
    start: mx.array | None = None,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """The cached keys that each query attends to (lightning indexer, DeepSeek-V3.2).

    The queries are the cache's last ``l`` tokens; query ``i`` sees the keys ``start`` to
    ``t - l + i``. Scores are ``sum_h (weights[h] * weight_scale) * relu(q[h] . key * scale)`` in
    fp32; the `k` best are selected, the lowest index among equals; a NaN ranks with -inf. Results
    depend neither on the number of queries nor on threads, except that Metal takes more than 16
    queries of a sequence as a prompt, whose scores its matrix units add in an order of their own.
    The op holds at most 64 MiB of scores at once (one query's, where `t` is beyond 2^24), however
    many queries there are.

    Args:
        q: float [b, l, heads, dim].
        keys: float [b, t, dim], or packed rows of `glm_fused.formats.kv_rows`.
        weights: float [b, l, heads].
        k: how many keys to select, at least 1.
        scale: the factor of a query's product with a key.
        weight_scale: the factor of the weights.
        start: int32 [b], each sequence's first key that is not padding; None: 0.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        int32 [b, l, k], ascending, then -1 where fewer than `k` keys are visible.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    kernel = routes.take(
        "indexer_topk", stream=stream, reference=reference, prompt=_is_index_prompt(q)
    )
    if kernel is Kernel.mlx:
        with routes.on(stream):
            return stock.indexer_topk(q, keys, weights * weight_scale, k, scale, start)
    try:
        return _ext.indexer_topk(q, keys, weights, k, scale, weight_scale, start, kernel, stream)
    except TypeError:
        raise unfit(
            "indexer_topk", keys=keys, k=k, scale=scale, weight_scale=weight_scale, start=start
        ) from None


def sparse_mla_decode(
    q: mx.array,
    latents: mx.array,
    ropes: mx.array | None = None,
    selected: mx.array | None = None,
    *,
    rank: int,
    scale: float,
    start: mx.array | None = None,
    reference: bool | None = None,
    stream: Stream = None,
) -> mx.array:
    """Absorbed multi-head latent attention over the selected cached rows (DeepSeek-V2).

    It computes ``softmax(q . row * scale) row[:rank]`` in fp32. The queries are the cache's last
    ``l`` tokens and see what `indexer_topk` lets them see; an entry of `selected` outside that,
    such as -1, is skipped. A query without keys gives zeros. Results depend neither on the number
    of queries nor on threads, except that Metal takes more than 16 queries of a sequence as a
    prompt, whose sums its matrix units add in an order of their own. The op needs heads * 4 bytes
    per query and listed key, and takes as many queries at a time as make 32 MiB of that, at least
    one; of a prompt on Metal nothing.

    Args:
        q: float [b, l, heads, rank + rope].
        latents: float [b, t, rank], or packed rows of `glm_fused.formats.kv_rows`, which include
            `ropes`.
        ropes: float [b, t, rope]; None where `latents` are packed rows or ``rope`` is 0.
        selected: int32 [b, l, k]; None: every visible key.
        rank: how many leading columns of a row are its value.
        scale: the factor of a query's product with a row.
        start: int32 [b], each sequence's first key that is not padding; None: 0.
        reference: True or False overrides the current path.
        stream: where to run; None: the default device.

    Returns:
        float32 [b, l, heads, rank].

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """
    listed = listed_keys(latents, selected)
    kernel = routes.take(
        "sparse_mla_decode",
        listed,
        stream=stream,
        reference=reference,
        prompt=_is_prompt(q, rank),
    )
    if kernel is Kernel.mlx:
        with routes.on(stream):
            return stock.sparse_mla_decode(q, latents, ropes, selected, rank, scale, start)
    try:
        return _ext.sparse_mla_decode(
            q, latents, ropes, selected, rank, scale, start, kernel, stream
        )
    except TypeError:
        raise unfit("sparse_mla_decode", rank=rank, scale=scale, start=start) from None


def _is_prompt(q: mx.array, rank: int) -> bool:
    """Whether Metal has a prompt's kernel for queries [b, l, heads, rank + rope]."""
    if q.ndim != 4 or q.shape[1] <= _ext.metal_max_tokens:
        return False
    return 0 < rank <= q.shape[3] and _ext.mla_prompt_takes(rank, q.shape[3] - rank)


def _is_index_prompt(q: mx.array) -> bool:
    """Whether Metal has a prompt's kernel for queries [b, l, heads, dim]."""
    many = q.ndim == 4 and q.shape[1] > _ext.metal_max_tokens
    return many and _ext.index_prompt_takes(q.shape[3])


def listed_keys(latents: mx.array, selected: mx.array | None) -> int:
    """How many keys are listed for a query of `sparse_mla_decode`."""
    return _size(latents, 1) if selected is None else _size(selected, -1)


def _size(a: mx.array, axis: int) -> int:
    """The size of an axis; of what the op refuses, with a message, any number does."""
    return a.shape[axis] if a.ndim == 3 else 1
