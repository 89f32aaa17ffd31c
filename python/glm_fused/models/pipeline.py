"""Pipeline parallel: what each of several ranks has of a model whose layers they share out.

Ranks are processes of one `mx.distributed` group. Each has some layers in a row, their caches and
the head; the first has the embedding and the layer of MTP, the last the norm before the head.
Layers that share an indexer's choice stay together, so what goes from rank to rank is the rows
between two layers, and what comes back from the last is the normed hidden states
(`glm_fused.models.line`). Then every rank has the logits, and goes on with the same token.

A token costs ``2 (n - 1)`` messages of hidden x 2 bytes, for GLM-5.2 12 KiB each, where tensor
parallel has 312 gathers: that suits slow links. But one rank works while the others wait. So the
chunks of a prompt follow one another: a rank takes the next as soon as it has handed on the last.
Several texts are decoded in as many batches as there are ranks, whose steps take turns
(`glm_fused.generation.batching.microbatches`).

With drafts the hidden states of prompts come back, too, a few chunks later, for the first rank's
layer of MTP. Its tokens go along the line before the step that takes them.

Where experts are streamed each rank has slots for those of its layers, as many as its own budget
holds, and no other waits for what is in them.

Nothing is computed otherwise than in one process: any number of ranks gives its bits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList

from .cache import Span, bytes_per_token
from .config import ModelArgs
from .decoder import Model
from .layers import Embedding, QuantizedEmbedding
from .line import Line, Place
from .prompt_memory import MOST_DRAFTS
from .sharded_layers import as_kind
from .tensor_names import layer_of

TOKEN_BYTES = 4  # of a token itself, where prompts are kept
EMBEDDING, NORM = "model.embed_tokens", "model.norm"  # the modules that one rank has


class StagedModel(Model):
    """A `Model` of which this rank has some layers; all have to make the same calls of it.

    ``args.layers`` are the rank's, and so are caches. Logits and hidden states of more tokens a
    text than a step with drafts takes come back only where all ranks `ask_for` them, or evaluate
    them before the next call.

    Attributes:
        line: the ranks that share the model.
        rows_dtype: the type of the rows that this rank's layers take.
    """

    line: Line
    rows_dtype: mx.Dtype
    _hidden_dtype: mx.Dtype
    _whole: ModelArgs

    def outputs(self, hidden: mx.array) -> list[mx.array]:
        """The rows that this rank has made."""
        return [hidden]

    def completed(self, found: list[mx.array]) -> tuple[mx.array, mx.array]:
        """Logits and hidden states, once the rows that were made here have gone around."""
        (x,) = found
        is_step = x.shape[1] <= 1 + MOST_DRAFTS
        hidden = self.line.around(x, self._hidden_dtype, is_awaited=is_step)
        return self.head(hidden), hidden

    def draft(
        self,
        tokens: mx.array,
        hidden: mx.array,
        cache: CacheList,
        selection: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """As `Model.draft`; on other ranks than the first, arrays like it that are not to be used.

        What all of them make of these is to be taken `of_first`.
        """
        if self.line.is_first:
            return super().draft(tokens, hidden, cache, selection)
        return mx.zeros((*tokens.shape, self.args.vocab_size)), hidden, None

    def make_mtp_cache(self) -> CacheList:
        """The cache of the MTP layer; on other ranks than the first, one without entries."""
        return super().make_mtp_cache() if self.line.is_first else CacheList()

    @property
    def has_mtp(self) -> bool:
        """Whether the first rank has the layer."""
        return self._whole.has_mtp

    def own_limit(self, limit: int, kv_format: str) -> int:
        """As `own_limit`, of the rank's layers."""
        return own_limit(limit, kv_format, self.args, self._whole)

    def stand_in(self, line: Line, whole: ModelArgs) -> None:
        """Take the place in the line; the model has the rank's layers of the ``whole`` by now."""
        decoder, args = self.model, self.args
        angles, span = decoder.angles(Span(0, 1)), Span(0, 1)

        def made(dtype: mx.Dtype) -> mx.Dtype:
            return decoder.run(mx.zeros((1, 1, args.hidden_size), dtype), span, angles, None).dtype

        table = decoder.embed_tokens
        first = table(mx.zeros((1, 1), mx.int32)).dtype if line.is_first else None
        self.line, self._whole = line, whole
        self.rows_dtype, self._hidden_dtype = line.agree_on_dtypes(first, made)
        if not line.is_first:
            taking = cast(_Taking, as_kind(_TAKING[type(table)], table))
            taking.take_from(line, args.hidden_size, self.rows_dtype)
            decoder.update_modules({"embed_tokens": taking})


class Elsewhere(nn.Module):
    """A layer that another rank has."""


class _Taking(nn.Module):
    """In place of an embedding: the rows of tokens, which the rank before has worked on."""

    def take_from(self, line: Line, width: int, dtype: mx.Dtype) -> None:
        """Say where rows come from, how wide they are, and of which type."""
        self._line, self._width, self._dtype = line, width, dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        """Tokens [...] -> their rows [..., width]."""
        return self._line.take((*tokens.shape, self._width), self._dtype)


class TakingEmbedding(_Taking, Embedding):  # type: ignore[misc]
    """In place of an `Embedding`, which may still be a tied head."""


class TakingQuantizedEmbedding(_Taking, QuantizedEmbedding):  # type: ignore[misc]
    """In place of a `QuantizedEmbedding`, which may still be a tied head."""


_TAKING: dict[type[nn.Module], type[nn.Module]] = {
    Embedding: TakingEmbedding,
    QuantizedEmbedding: TakingQuantizedEmbedding,
}


@dataclass(frozen=True)
class Stage:
    """This rank's layers of a model.

    Attributes:
        args: of the whole model.
        line: its place, a `Line` where a model is loaded.
        layers: the rank's, of the decoder's.
    """

    args: ModelArgs
    line: Place
    layers: slice

    @classmethod
    def of(cls, args: ModelArgs, module_bytes: Mapping[str, int], line: Place) -> Stage:
        """The layers of this rank, of which each gets about as many bytes; see `bounds_of`.

        ``module_bytes`` are those of modules by their paths.
        """
        bounds = bounds_of(args, module_bytes, line.size)
        return cls(args, line, slice(bounds[line.rank], bounds[line.rank + 1]))

    def parts(self) -> dict[str, slice]:
        """No module is split."""
        return {}

    def share(self, path: str) -> float:
        """Which share of a module's weight the rank has: all of it, or nothing."""
        return float(self.has(f"{path}."))

    def local_args(self, args: ModelArgs) -> ModelArgs:
        """The args of the whole model, whose layers keep their numbers in names."""
        return args

    def has(self, name: str) -> bool:
        """Whether the rank needs a tensor or parameter of the model."""
        layer = layer_of(name)
        if layer is not None:
            is_mtp = layer >= len(self.args.layers)
            here = self.layers.start <= layer < self.layers.stop
            return self.line.is_first if is_mtp else here
        if name.startswith(f"{EMBEDDING}."):
            return self.line.is_first or self.args.tie_word_embeddings
        return self.line.is_last or not name.startswith(f"{NORM}.")

    def own_args(self) -> ModelArgs:
        """The args of a model with the rank's layers alone."""
        args = copy.copy(self.args)
        args.layers = args.layers[self.layers]
        args.has_mtp = args.has_mtp and self.line.is_first
        return args

    def keep(self, model: Model) -> None:
        """Leave in a model that has no weights yet what the rank has of it."""
        decoder = model.model
        model.args = self.own_args()
        layers: list[nn.Module] = [
            layer if self.has(f"model.layers.{i}.") else Elsewhere()
            for i, layer in enumerate(decoder.layers)
        ]
        decoder.update_modules({"layers": layers})
        decoder.here = self.layers
        if not self.line.is_last:
            decoder.update_modules({"norm": nn.Identity()})
        if not self.has(f"{EMBEDDING}."):
            del decoder.embed_tokens["weight"]

    def join(self, model: Model) -> None:
        """Have the model with the rank's layers take its place in the line."""
        assert isinstance(model, StagedModel) and isinstance(self.line, Line)
        model.stand_in(self.line, self.args)


def own_limit(limit: int, kv_format: str, own: ModelArgs, whole: ModelArgs) -> int:
    """A limit of bytes for kept prompts here, so that ranks keep as many tokens as with ``limit``.

    That is for rows of all layers of the ``whole`` model; ``own`` has the rank's.
    """
    mine, all_of_them = (
        bytes_per_token(args, kv_format, args.layers) + TOKEN_BYTES for args in (own, whole)
    )
    return limit // all_of_them * mine


def turns_of(model: Model) -> int:
    """How many batches are decoded in turns, so that all ranks of a ``model`` have work."""
    return model.line.size if isinstance(model, StagedModel) else 1


def has_mtp(model: Model) -> bool:
    """Whether a model drafts with a layer of its own, whichever rank has it."""
    return model.has_mtp if isinstance(model, StagedModel) else model.args.has_mtp


def ask_for(model: Model, hidden: mx.array, at_once: bool) -> None:
    """Have the hidden states of a prompt come back, as `Line.ask_for`; all ranks have to."""
    if isinstance(model, StagedModel):
        model.line.ask_for(hidden, at_once)


def of_first(model: Model, x: mx.array) -> mx.array:
    """What the rank with the MTP layer has where others have an ``x`` like it."""
    return model.line.from_first(x) if isinstance(model, StagedModel) else x


def bounds_of(args: ModelArgs, module_bytes: Mapping[str, int], ranks: int) -> tuple[int, ...]:
    """Where the layers of each of so many ranks begin, and where the last one's end.

    The rank with the most bytes has as few as can be. Layers that share an indexer's choice stay
    together.

    Raises ValueError where there are fewer such groups than ranks.
    """
    starts = [i for i, layer in enumerate(args.layers) if layer.is_full]
    if len(starts) < ranks:
        raise ValueError(
            f"[shard] {len(args.layers)} layers are {len(starts)} groups, each of which shares an"
            f" indexer's choice: not enough for {ranks} ranks."
        )
    layer_bytes, first_bytes = _bytes(args, module_bytes)
    sums = [0, *accumulate(layer_bytes)]

    @cache
    def best(first: int, ranks: int) -> tuple[int, tuple[int, ...]]:
        """The least largest part of what begins with a group, and where parts begin and end."""
        begin = starts[first]
        own = -sums[begin] + (0 if first else first_bytes)
        if ranks == 1:
            return own + sums[-1], (begin, len(args.layers))
        found = []
        for end in range(first + 1, len(starts) - ranks + 2):
            largest, rest = best(end, ranks - 1)
            found.append((max(own + sums[starts[end]], largest), (begin, *rest)))
        return min(found)

    return best(0, ranks)[1]


def _bytes(args: ModelArgs, module_bytes: Mapping[str, int]) -> tuple[list[int], int]:
    """The bytes of each of the decoder's layers, and of what the first rank alone has besides."""
    layers, first = [0] * len(args.layers), 0
    for path, nbytes in module_bytes.items():
        layer = layer_of(f"{path}.")
        if layer is not None and layer < len(layers):
            layers[layer] += nbytes
        elif layer is not None or (path == EMBEDDING and not args.tie_word_embeddings):
            first += nbytes
    return layers, first
