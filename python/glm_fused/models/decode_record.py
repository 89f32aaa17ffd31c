"""What a decode step is recorded of: arrays that stand for its inputs and caches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from .. import _ext
from ..formats.kv_rows import format_of, row_widths
from .cache import Span, empty_cache
from .chains import Chain
from .rope import Angles, Page


class _Input(NamedTuple):
    """What an input of a step is like."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @classmethod
    def of(cls, array: mx.array) -> _Input:
        return cls(array.shape, array.dtype)


class Inputs(NamedTuple):
    """What all of them are like: tokens or their rows, angles, starts of rows, what else."""

    rows: _Input
    angle: _Input
    start: _Input | None
    given: tuple[_Input, ...]


class StandIns(NamedTuple):
    """Arrays that stand for the inputs of a step."""

    rows: mx.array
    angles: Angles
    start: mx.array | None
    given: list[mx.array]

    @classmethod
    def of(cls, inputs: Inputs) -> StandIns:
        rows, angle, start, given = inputs
        return cls(
            _stand_in(*rows),
            Angles(_stand_in(*angle), _stand_in(*angle)),
            None if start is None else _stand_in(*start),
            [_stand_in(*each) for each in given],
        )

    def arrays(self) -> list[mx.array]:
        """All of them, in the order in which a step takes them."""
        return [self.rows, *self.angles, *([] if self.start is None else [self.start]), *self.given]


def inputs_of(
    tokens: mx.array,
    embedded: mx.array | None,
    page: Page,
    span: Span,
    given: Sequence[mx.array],
) -> Inputs:
    first = _Input(tokens.shape, mx.int32) if embedded is None else _Input.of(embedded)
    batch, heads, _, pairs = page.angles.cos.shape
    angle = _Input((batch, heads, span.length, pairs), page.angles.cos.dtype)
    start = None if span.start is None else _Input.of(span.start)
    return Inputs(first, angle, start, tuple(map(_Input.of, given)))


def record(
    chain: Chain, model: Any, made: StandIns, x: mx.array, dtype: mx.Dtype, selects: bool
) -> _ext.DecodeStep:
    """The step that ``model`` makes of stand-ins, the rows ``x`` of its tokens, and caches."""
    args, (batch, length, _) = model.args, x.shape
    total = length + (args.index_topk if selects else 0)
    cache: list[CacheList] = [empty_cache(spec) for spec in chain.specs(args)]
    widths = (args.kv_lora_rank, args.qk_rope_head_dim), (args.index_head_dim, 0)
    for layer in cache:
        for entry, (rank, rope) in zip(layer.caches, widths, strict=False):
            entry.offset = total - length
            entry.keys, entry.values = (
                _stand_in((batch, 1, total, width), dtype)
                for width in row_widths(format_of(dtype), rank, rope)
            )
    entries = [entry for layer in cache for entry in layer.caches]
    caches = [copy.copy(rows) for rows in _rows(entries)]  # appending changes the others
    span = Span(total - length, length, made.start)
    outputs = chain.run(model, x, made.given, span, made.angles, cache)
    return _ext.DecodeStep(made.arrays(), caches, outputs, _rows(entries))


def _rows(entries: Sequence[Any]) -> list[mx.array]:
    """The arrays to which a step appends: all but values without width."""
    rows = []
    for entry in entries:
        rows.append(entry.keys)
        if entry.values.shape[-1]:
            rows.append(entry.values)
    return rows


def _stand_in(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array for whose values there is neither memory nor use."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array
