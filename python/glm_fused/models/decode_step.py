"""A decode step on a CPU as one node of the graph.

The node is recorded from the model itself: its layers run once on arrays that stand for the real
ones, and what they did with the ops is kept, ready to run. A step then costs neither Python nor a
graph, and its bits are those of the layers one by one, since it runs their kernels.

What decides which step it is, and whether tokens and cache fit, is found out once, too: a step that
follows another on the same cache only makes sure that nothing has changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache

from .. import _ext, ops
from ..environment import debug
from ..formats.kv_rows import format_of, row_widths
from ..ops import Weight, metal_sim, paths
from .cache import Span, make_room
from .config import ModelArgs
from .layers import Embedding, QuantizedEmbedding
from .rope import Angles, Page

_MOST = 32  # kinds of steps that are kept


class _Decoder(Protocol):
    @property
    def embed_tokens(self) -> nn.Module: ...

    def page(self, span: Span) -> Page: ...

    def embed(self, tokens: mx.array) -> mx.array: ...

    def run(
        self, x: mx.array, span: Span, angles: Angles, cache: Sequence[Any] | None
    ) -> mx.array: ...


class Model(Protocol):
    """What is recorded: a `glm_fused.models.decoder.Model`."""

    args: ModelArgs

    @property
    def model(self) -> _Decoder: ...

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def training(self) -> bool: ...

    def is_plain(self) -> bool: ...

    def head(self, x: mx.array) -> mx.array: ...


class DecodeSteps:
    """The recorded steps of a model, for each number of tokens and kind of cache.

    They hold the model's weights. A weight or layer that is replaced or changed in place is noticed
    at the next step, which is recorded anew. A copy of the model records its own, unless it is a
    shallow one: then they take turns.
    """

    def __init__(self) -> None:
        self._parts: _Parts | None = None
        self._last: _Last | None = None

    def __reduce__(self) -> tuple[type[DecodeSteps], tuple[()]]:
        return DecodeSteps, ()

    def again(self, model: Model, tokens: mx.array, cache: Sequence[Any] | None) -> mx.array | None:
        """What `run` gives where all is as it was in the last step, but for what that appended.

        None, with nothing done, where it is not. Tokens and cache need not be checked.
        """
        last = self._last
        if last is None or model.training or metal_sim.active():
            return None
        if not last.parts.are_in_place(model):
            return None
        return last.decoding(tokens, cache)

    def run(self, model: Model, tokens: mx.array, cache: Sequence[Any] | None) -> mx.array | None:
        """The logits [b, l, vocab] of checked tokens [b, l], which are appended to ``cache``.

        None, with nothing done, where the layers have to run one by one: on a GPU or the reference
        path, for a prompt, without cached keys, in training, while a function is transformed, or
        where not all weights are plain ones in memory.
        """
        if not ops.blocks.takes_on_cpu(tokens) or cache is None or model.training:
            return None
        keys = cache[0][0].keys
        if keys is None:
            return None
        parts = self._parts
        if parts is None or not parts.are_in_place(model):
            self._last = None  # lets go of weights before others are taken
            self._parts = parts = _Parts(model)
        if not parts.plain or not _ext.DecodeStep.takes([tokens, keys]):
            return None
        embedded = parts.embedded(model, tokens)
        decoding = self._decoding(model, parts, tokens, embedded, cache)
        if decoding is None:
            return None
        # The angles of rows with padding are of this step alone.
        follows = embedded is None and not hasattr(cache[0][0], "left_padding")
        self._last = _Last(parts, decoding) if follows else None
        return decoding(tokens, cache, embedded)

    def _decoding(
        self,
        model: Model,
        parts: _Parts,
        tokens: mx.array,
        embedded: mx.array | None,
        cache: Sequence[Any],
    ) -> _ext.Decoding | None:
        """The step for such tokens and this cache, which gets room for them."""
        entries = [entry for layer in cache for entry in layer.caches]
        span, topk = Span.of(cache, tokens.shape[1]), model.args.index_topk
        page, selects = model.model.page(span), span.total > topk
        inputs = _inputs(tokens, embedded, page, span)
        step = self._step(model, parts, inputs, entries[0].keys.dtype, selects)
        if step is None:
            return None
        for entry in entries:
            make_room(entry, span.length)
        room = min(entry.keys.shape[2] for entry in entries)
        most = [room, page.end, model.args.max_position_embeddings] + [topk] * (not selects)
        least = max(page.first + span.length, topk + 1 if selects else 0)
        return _ext.Decoding(
            step, cache, tokens, None if parts.table is None else model.args.vocab_size,
            page.angles, page.first, span.start, (least, min(most)), paths.override, paths.VARIABLE,
        )  # fmt: skip

    def _step(
        self,
        model: Model,
        parts: _Parts,
        inputs: list[_Input],
        dtype: mx.Dtype,
        selects: bool,
    ) -> _ext.DecodeStep | None:
        """The step for such inputs and caches; None where a norm widens what it is given."""
        key = (str(mx.default_stream(mx.cpu)), _ext.num_threads(), selects, dtype, *inputs)
        if key in (steps := parts.steps):
            return steps[key]
        if len(steps) >= _MOST:
            parts.steps = steps = {}  # not cleared: another thread may be at it
        stand_ins = [_stand_in(*each) for each in inputs]
        x = stand_ins[0]
        if parts.table is not None:
            x = _ext.embed(x, parts.table, model.args.hidden_size)
        keeps_dtype = all(layer.keeps_dtype(x) for layer in model.layers)
        step = _record(model, stand_ins, x, dtype, selects) if keeps_dtype else None
        how = "layer by layer: a norm widens its input" if step is None else "as one recorded node"
        debug("decode steps of %d x %d tokens run %s", *x.shape[:2], how)
        steps[key] = step
        return step


class _Input(NamedTuple):
    """What an input of a step is like."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @classmethod
    def of(cls, array: mx.array) -> _Input:
        return cls(array.shape, array.dtype)


class _Last(NamedTuple):
    """The last step: what it was made of, and how it is made again."""

    parts: _Parts
    decoding: _ext.Decoding


class _Parts:
    """What a model is made of, every layer and array, where it is, and the steps of just that."""

    def __init__(self, model: Model):
        self.steps: dict[tuple[Any, ...], _ext.DecodeStep | None] = {}
        self._containers = list(_containers(model))
        self._items = list(map(_items, self._containers))
        parts = [part for items in self._items for part in items]
        self._arrays = arrays = [part for part in parts if isinstance(part, mx.array)]
        self._values = _ext.ArrayValues(arrays)
        self.table = _table(model.model.embed_tokens)
        self.plain = _ext.DecodeStep.takes(arrays) and model.is_plain()
        if self.plain:
            mx.eval(arrays)
        else:
            debug("decode steps run layer by layer: weights are streamed, adapted or traced")

    def are_in_place(self, model: Model) -> bool:
        """Whether the model still has these parts, as they were, and no others."""
        return (
            self._containers[0] is model
            and _ext.same_items(self._containers, self._items)
            and self._values.are_of(self._arrays)
        )

    def embedded(self, model: Model, tokens: mx.array) -> mx.array | None:
        """The rows of tokens, unless a step takes them itself."""
        return model.model.embed(tokens) if self.table is None else None


def _containers(part: Any) -> Iterator[Any]:
    """The modules, lists and dicts of a module, and itself."""
    if isinstance(part, dict | list):  # a module is a dict
        yield part
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _containers(inner)


def _items(container: dict[Any, Any] | list[Any]) -> list[Any]:
    """What `_ext.same_items` compares a container with."""
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return list(container)


def _table(embedding: nn.Module) -> Weight | None:
    """The rows that tokens take, where a step can take them itself."""
    if type(embedding) not in (Embedding, QuantizedEmbedding):
        return None
    table: Weight = embedding.as_weight()
    return table if table.format.mode in ("affine", "dense") else None


def _inputs(tokens: mx.array, embedded: mx.array | None, page: Page, span: Span) -> list[_Input]:
    """The inputs of a step: tokens or their rows, angles and starts of rows."""
    first = _Input(tokens.shape, mx.int32) if embedded is None else _Input.of(embedded)
    batch, heads, _, pairs = page.angles.cos.shape
    angle = _Input((batch, heads, span.length, pairs), page.angles.cos.dtype)
    return [first, angle, angle, *([] if span.start is None else [_Input.of(span.start)])]


def _record(
    model: Model, inputs: list[mx.array], x: mx.array, dtype: mx.Dtype, selects: bool
) -> _ext.DecodeStep:
    """The step that ``model`` makes of ``inputs``, the rows ``x`` of its tokens, and caches."""
    args, (batch, length, _) = model.args, x.shape
    total = length + (args.index_topk if selects else 0)
    cache = [CacheList(*(KVCache() for _ in spec.cache)) for spec in args.layers]
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
    _, cos, sin, *start = inputs
    span = Span(total - length, length, *start)
    logits = model.head(model.model.run(x, span, Angles(cos, sin), cache))
    return _ext.DecodeStep(inputs, caches, logits, _rows(entries))


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
