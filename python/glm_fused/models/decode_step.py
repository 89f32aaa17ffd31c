"""A decode step on a CPU, or a draft, as one node of the graph.

The node is recorded from the model itself: its layers run once on arrays that stand for the real
ones, and what they did with the ops is kept, ready to run. A step then costs neither Python nor a
graph, and its bits are those of the layers one by one, since it runs their kernels.

What decides which step it is, and whether tokens and cache fit, is found out once, too: a step that
follows another on the same cache only makes sure that nothing has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from .. import _ext, ops
from ..environment import debug
from ..ops import Weight, metal_sim, paths
from .cache import Span, make_room, padding_of
from .chains import Chain
from .config import ModelArgs
from .decode_parts import Parts
from .decode_record import Inputs, StandIns, inputs_of, record
from .layers import Embedding, QuantizedEmbedding
from .ranks import Ranks, Traffic
from .rope import Page
from .sharded_indexer import pays

_MOST = 32  # kinds of steps that are kept


class _Decoder(Protocol):
    @property
    def embed_tokens(self) -> nn.Module: ...

    def page(self, span: Span) -> Page: ...

    def embed(self, tokens: mx.array) -> mx.array: ...


class Model(Protocol):
    """What steps are recorded of: a `glm_fused.models.decoder.Model`."""

    args: ModelArgs

    @property
    def model(self) -> _Decoder: ...

    @property
    def training(self) -> bool: ...

    @property
    def ranks(self) -> Ranks | None: ...


class DecodeSteps:
    """The recorded steps of a model's chain, for each number of tokens and kind of cache.

    They hold the model's weights. A weight or layer that is replaced or changed in place is noticed
    at the next step, which is recorded anew. A copy of the model records its own, unless it is a
    shallow one: then they take turns.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._parts: Parts | None = None
        # The last steps of each kind, by the shape of tokens and how much else they are given.
        self._last: dict[tuple[Any, int], _Last] = {}

    def __reduce__(self) -> tuple[type[DecodeSteps], tuple[Chain]]:
        return DecodeSteps, (self._chain,)

    def again(
        self,
        model: Model,
        tokens: mx.array,
        cache: Sequence[Any] | None,
        given: Sequence[mx.array] = (),
    ) -> list[mx.array] | None:
        """What `run` gives where all is as it was in the last such step, but for more rows.

        None, with nothing done, where it is not. Tokens and cache need not be checked.
        """
        last = self._last.get((getattr(tokens, "shape", None), len(given)))
        if last is None or model.ranks is not None or model.training or metal_sim.active():
            return None
        if not last.parts.are_in_place(self._chain.roots(model)):
            return None
        if not last.padding.are_of(padding_of(cache)):
            return None
        return last.decoding(tokens, cache, given)

    def run(
        self,
        model: Model,
        tokens: mx.array,
        cache: Sequence[Any] | None,
        given: Sequence[mx.array] = (),
    ) -> list[mx.array] | None:
        """What the chain gives for checked tokens [b, l], which are appended to ``cache``.

        None, with nothing done, where the layers have to run one by one: on a GPU or the reference
        path, for a prompt, without cached keys, in training, while a function is transformed, or
        where not all weights are plain ones in memory.
        """
        if not ops.blocks.takes_on_cpu(tokens) or cache is None or model.training:
            return None
        keys = cache[0][0].keys
        if keys is None:
            return None
        parts, roots = self._parts, self._chain.roots(model)
        if parts is None or not parts.are_in_place(roots):
            self._last = {}  # lets go of weights before others are taken
            table = _table(model.model.embed_tokens)
            self._parts = parts = Parts(roots, table, self._chain.is_recordable(model))
        if not parts.recordable or not _ext.DecodeStep.takes([tokens, keys, *given]):
            return None
        if model.ranks is not None:
            return self._run_with_others(model, model.ranks, parts, tokens, cache, given)
        embedded = model.model.embed(tokens) if parts.table is None else None
        found = self._decoding(model, parts, tokens, embedded, cache, given)
        if found is None:
            return None
        decoding, _ = found
        if embedded is None:
            if len(self._last) >= _MOST:
                self._last = {}
            self._last[tokens.shape, len(given)] = _Last(
                parts, decoding, _ext.ArrayValues(padding_of(cache))
            )
        return decoding(tokens, cache, given, embedded)

    def _run_with_others(
        self,
        model: Model,
        ranks: Ranks,
        parts: Parts,
        tokens: mx.array,
        cache: Sequence[Any],
        given: Sequence[mx.array],
    ) -> list[mx.array] | None:
        """`run`, of a rank's part of a model: the step is one of the nodes that wait for others."""
        (batch, length), args = tokens.shape, model.args
        width = args.index_n_heads * args.index_head_dim
        total, topk = Span.of(cache, length).total, args.index_topk
        if total > topk and pays(batch, length, total, topk, width, ranks.size):
            return None  # ranks share out the scores
        tokens = ranks.follow(tokens)
        embedded = model.model.embed(tokens) if parts.table is None else None
        found = self._decoding(model, parts, tokens, embedded, cache, given)
        if found is None:
            return None
        decoding, traffic = found
        made = decoding(tokens, cache, given, embedded)
        if made is not None:
            ranks.made(made[0], traffic)
        return made

    def _decoding(
        self,
        model: Model,
        parts: Parts,
        tokens: mx.array,
        embedded: mx.array | None,
        cache: Sequence[Any],
        given: Sequence[mx.array],
    ) -> tuple[_ext.Decoding, Traffic] | None:
        """The step for such tokens and this cache, which gets room for them, and its gathers."""
        entries = [entry for layer in cache for entry in layer.caches]
        span, topk = Span.of(cache, tokens.shape[1]), model.args.index_topk
        page, selects = model.model.page(span), span.total > topk
        inputs = inputs_of(tokens, embedded, page, span, given)
        step, traffic = self._step(model, parts, inputs, entries[0].keys.dtype, selects)
        if step is None:
            return None
        for entry in entries:
            make_room(entry, span.length)
        room = min(entry.keys.shape[2] for entry in entries)
        most = [room, page.end, model.args.max_position_embeddings] + [topk] * (not selects)
        least = max(page.first + span.length, topk + 1 if selects else 0)
        decoding = _ext.Decoding(
            step, cache, tokens, None if parts.table is None else model.args.vocab_size,
            page.angles, page.first, span.start, given, (least, min(most)),
            paths.override, paths.VARIABLE,
        )  # fmt: skip
        return decoding, traffic

    def _step(
        self,
        model: Model,
        parts: Parts,
        inputs: Inputs,
        dtype: mx.Dtype,
        selects: bool,
    ) -> tuple[_ext.DecodeStep | None, Traffic]:
        """The step for such inputs and caches, and what it gathers.

        It is None where a norm widens what it is given.
        """
        ranks = model.ranks
        is_alone = ranks is not None and ranks.is_alone
        key = (str(mx.default_stream(mx.cpu)), _ext.num_threads(), selects, dtype, inputs, is_alone)
        if key in (steps := parts.steps):
            return steps[key]
        if len(steps) >= _MOST:
            parts.steps = steps = {}  # not cleared: another thread may be at it
        made = StandIns.of(inputs)
        x = made.rows
        if parts.table is not None:
            x = _ext.embed(x, parts.table, model.args.hidden_size)
        step, traffic = None, Traffic()
        if self._chain.keeps_dtype(model, x, made.given):
            make = partial(record, self._chain, model, made, x, dtype, selects)
            step, traffic = (make(), traffic) if ranks is None else ranks.apart(make)
        how = "layer by layer: a norm widens its input" if step is None else "as one recorded node"
        debug("decode steps of %d x %d tokens run %s", *x.shape[:2], how)
        steps[key] = step, traffic
        return step, traffic


class _Last(NamedTuple):
    """The last step: what it was made of, and how it is made again."""

    parts: Parts
    decoding: _ext.Decoding
    padding: _ext.ArrayValues  # of the rows, whose angles it has


def _table(embedding: nn.Module) -> Weight | None:
    """The rows that tokens take, where a step can take them itself."""
    if type(embedding) not in (Embedding, QuantizedEmbedding):
        return None
    table: Weight = embedding.as_weight()
    return table if table.format.mode in ("affine", "dense") else None
