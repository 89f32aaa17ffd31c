"""The stages of a forward: what each computes, with the weights and the cache of a loaded model.

A stage runs alone, on random activations of the shapes that it has in the model, through the layers
and ops that the model is made of. Those of a decode step together hold every parameter once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import ops
from ..formats.kv_rows import format_of, row_bytes
from ..host import to_numpy
from ..models.attention import Attention
from ..models.cache import Span
from ..models.decoder import Model
from ..models.layer import DecoderLayer
from ..models.layers import is_plain, keeps_dtype
from ..models.moe import MoE, SwitchMLP
from ..models.rope import Angles, Rope

EMBEDDING = "embedding"
PROJECTIONS = "norm, projections"
INDEXER = "indexer, top-k"
ATTENTION = "attention"
OUTPUT = "output projection"
DENSE = "dense MLP"
EXPERTS = "router, experts"
HEAD = "norm, head"
ORDER = (EMBEDDING, PROJECTIONS, INDEXER, ATTENTION, OUTPUT, DENSE, EXPERTS, HEAD)

Arrays = mx.array | tuple[mx.array, ...]
Parameters = list[tuple[str, mx.array]]


@dataclass(frozen=True)
class Stage:
    """One stage of one layer, or of the model's ends.

    Attributes:
        name: one of `ORDER`.
        build: makes the graph of one run.
        held_bytes: of the parameters that belong to it.
        read_bytes: of the weights that a run reads.
        cache_bytes: of the cached rows that a run reads.
    """

    name: str
    build: Callable[[], Arrays]
    held_bytes: int = 0
    read_bytes: float = 0.0
    cache_bytes: int = 0


def stages(model: Model, cache: Sequence[Any], length: int, logits: bool = True) -> list[Stage]:
    """The stages of a forward of ``length`` tokens whose keys are the last ones of ``cache``.

    The cache has to hold ``length`` tokens or more, and is only read. Its first tokens count as
    those that were there before. Without ``logits``, as in a prompt, there is no head, and no stage
    of the last layer, of which only the cached rows are computed.
    """
    return list(_Forward(model, cache, length).stages(logits))


def parameter_bytes(*modules: nn.Module) -> int:
    """The bytes of all parameters of modules."""
    arrays = [array for m in modules for _, array in cast(Parameters, tree_flatten(m.parameters()))]
    return sum(array.nbytes for array in arrays)


class _Forward:
    """What the stages of one forward share: activations x [1, l, hidden], span and angles."""

    def __init__(self, model: Model, cache: Sequence[Any], length: int):
        self.model, self.cache, self.args = model, cache, model.args
        self.span = Span(cache[0][0].size() - length, length)
        self.tokens = mx.random.randint(0, self.args.vocab_size, (1, length), mx.int32)
        self.dtype = model.model.embed_tokens(self.tokens[:, :1]).dtype
        self.x = self._random(1, length, self.args.hidden_size)
        rope = Rope(self.args.rope, self.args.qk_rope_head_dim)
        self.angles: Angles = rope.angles(self.span.positions())
        mx.eval(self.tokens, self.x, *self.angles)

    def _random(self, *shape: int) -> mx.array:
        return mx.random.normal(shape).astype(self.dtype)

    def stages(self, logits: bool) -> Iterator[Stage]:
        embedding, vocabulary = self.model.model.embed_tokens, self.args.vocab_size
        held = parameter_bytes(embedding)
        read = min(held, held * self.span.length / vocabulary)
        yield Stage(EMBEDDING, lambda: embedding(self.tokens), held, read)
        selection = None
        layers = list(zip(self.model.layers, self.cache, strict=True))
        for layer, layer_cache in layers if logits else layers[:-1]:
            selection = yield from self._attention(layer, layer_cache, selection)
            yield self._mlp(layer)
        if logits:
            yield self._head()

    def _attention(
        self, layer: DecoderLayer, cache: Any, selection: mx.array | None
    ) -> Generator[Stage, None, mx.array | None]:
        """The stages of a layer's attention; returns the selection for the next layer."""
        attention = layer.self_attn
        yield self._projections(layer)
        if "indexer" in attention:
            selection = None
            if attention.indexer.scores(self.span):
                stage, selection = self._indexer(attention, cache)
                yield stage
        yield self._attend(attention, cache, selection)
        yield self._output(attention)
        return selection

    def _projections(self, layer: DecoderLayer) -> Stage:
        attention, norm = layer.self_attn, layer.input_layernorm
        norms = norm, attention.q_a_layernorm, attention.kv_a_layernorm
        held = parameter_bytes(
            *norms,
            attention.q_a_proj,
            attention.q_b_proj,
            attention.kv_a_proj_with_mqa,
            attention.embed_q,
        )
        idle = 0
        if "indexer" in attention:
            indexer = attention.indexer
            held += parameter_bytes(indexer)
            if not indexer.scores(self.span):  # only its keys are wanted
                idle = parameter_bytes(indexer.wq_b, indexer.weights_proj)
        return Stage(PROJECTIONS, lambda: self._project(layer), held, held - idle)

    def _project(self, layer: DecoderLayer) -> tuple[mx.array, ...]:
        """What attention computes before its caches are updated, in one node where it can be."""
        attention, norm = layer.self_attn, layer.input_layernorm
        if not self._in_block(attention, norm):
            return self._project_by_ops(attention, norm)
        return ops.blocks.attention_project(
            self.x,
            *self.angles,
            (norm.weight, norm.eps),
            attention.q_a_proj.as_weight(),
            (attention.q_a_layernorm.weight, attention.q_a_layernorm.eps),
            attention.q_b_proj.as_weight(),
            attention.kv_a_proj_with_mqa.as_weight(),
            (attention.kv_a_layernorm.weight, attention.kv_a_layernorm.eps),
            attention.embed_q.as_weight(),
            attention.nope_dim,
            self._indexer_in_block(attention),
        )

    def _indexer_in_block(self, attention: Attention) -> ops.blocks.IndexerArguments | None:
        """What the block of projections needs of a full layer's indexer."""
        if "indexer" not in attention:
            return None
        indexer = attention.indexer
        return indexer.in_block(indexer.scores(self.span))

    def _in_block(self, attention: Attention, *norms: Any) -> bool:
        """Whether a layer's attention runs as blocks: few tokens, and matrices are all it has."""
        matrices = (
            attention.q_a_proj,
            attention.q_b_proj,
            attention.kv_a_proj_with_mqa,
            attention.embed_q,
            attention.unembed_out,
            attention.o_proj,
        )
        norms += attention.q_a_layernorm, attention.kv_a_layernorm
        if "indexer" in attention:
            norms += (attention.indexer.k_norm,)
            if not attention.indexer.is_plain():
                return False
        return (
            ops.blocks.takes(self.x)
            and all(map(is_plain, matrices))
            and all(keeps_dtype(norm, self.x) for norm in norms)
        )

    def _project_by_ops(self, attention: Attention, norm: Any) -> tuple[mx.array, ...]:
        h = norm(self.x)
        q_latent = attention.q_a_layernorm(attention.q_a_proj(h))
        q = attention.q_b_proj(q_latent).reshape(1, self.span.length, attention.heads, -1)
        q_nope, q_pe = mx.split(q.swapaxes(1, 2), [attention.nope_dim], axis=-1)
        kv = attention.kv_a_proj_with_mqa(h)[:, None]
        latents, k_pe = mx.split(kv, [attention.latent_dim], axis=-1)
        projected = (
            mx.concatenate([attention.embed_q(q_nope), ops.rotate(q_pe, *self.angles)], axis=-1),
            attention.kv_a_layernorm(latents),
            ops.rotate(k_pe, *self.angles),
        )
        if "indexer" not in attention:
            return projected
        scores = attention.indexer.scores(self.span)
        return *projected, *attention.indexer.project(h, q_latent, self.angles, scores)

    def _indexer(self, attention: Attention, cache: Any) -> tuple[Stage, mx.array]:
        """The stage of a full layer that scores keys, and what it selects."""
        indexer, rows = attention.indexer, cache[1].keys[:, 0, : self.span.total]
        queries = self._random(1, self.span.length, indexer.heads, indexer.head_dim)
        weights = mx.random.normal((1, self.span.length, indexer.heads))
        mx.eval(queries, weights)

        def build() -> mx.array:
            return indexer.select(queries, weights, rows, self.span)

        read = self.span.total * row_bytes(format_of(rows.dtype), indexer.head_dim, 0)
        selection = build()
        mx.eval(selection)
        return Stage(INDEXER, build, cache_bytes=read), selection

    def _attend(self, attention: Attention, cache: Any, selection: mx.array | None) -> Stage:
        total, length = self.span.total, self.span.length
        latents, values = cache[0].keys[:, 0, :total], cache[0].values[:, 0, :total]
        ropes = values if values.shape[-1] else None
        rope_dim = self.args.qk_rope_head_dim
        queries = self._random(1, length, attention.heads, attention.latent_dim + rope_dim)
        mx.eval(queries)
        keys = total if selection is None else min(total, length * selection.shape[-1])
        read = keys * row_bytes(format_of(latents.dtype), attention.latent_dim, rope_dim)

        def build() -> mx.array:
            return ops.sparse_mla_decode(
                queries,
                latents,
                ropes,
                selection,
                rank=attention.latent_dim,
                scale=attention.scale,
            )

        return Stage(ATTENTION, build, cache_bytes=read)

    def _output(self, attention: Attention) -> Stage:
        shape = (1, self.span.length, attention.heads, attention.latent_dim)
        attended = mx.random.normal(shape)
        mx.eval(attended)
        values, output = attention.unembed_out, attention.o_proj

        def by_ops() -> mx.array:
            heads = values(attended.swapaxes(1, 2).astype(self.dtype)).swapaxes(1, 2)
            return self.x + output(heads.reshape(1, self.span.length, -1))

        def block() -> mx.array:
            weights = values.as_weight(), output.as_weight()
            return ops.blocks.attention_output(self.x, attended, *weights)

        held = parameter_bytes(values, output)
        return Stage(OUTPUT, block if self._in_block(attention) else by_ops, held, held)

    def _mlp(self, layer: DecoderLayer) -> Stage:
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        held = parameter_bytes(mlp, norm)
        if not isinstance(mlp, MoE):
            return Stage(DENSE, lambda: mlp(self.x, norm), held, held)
        weights = [weight for weight in mlp.switch_mlp.weights() if weight is not None]
        experts, _ = mlp.gate(norm(self.x)[0])
        chosen = np.unique(to_numpy(experts)).size
        # What streams experts has no parameters, but slots with weights.
        stacked = sum(plane.nbytes for weight in weights for plane in weight.planes)
        in_memory = isinstance(mlp.switch_mlp, SwitchMLP)
        slots = weights[0].planes[0].shape[0]
        read = held - in_memory * stacked + chosen * stacked / slots
        return Stage(EXPERTS, lambda: mlp(self.x, norm), held, read)

    def _head(self) -> Stage:
        model, norm = self.model, self.model.model.norm
        if "lm_head" in model:
            held = parameter_bytes(model.lm_head, norm)
            return Stage(HEAD, lambda: model.lm_head(norm(self.x)), held, held)
        embedding, held = model.model.embed_tokens, parameter_bytes(norm)
        return Stage(
            HEAD,
            lambda: ops.quantized_matvec(norm(self.x), embedding.as_weight()),
            held,
            held + parameter_bytes(embedding),
        )
