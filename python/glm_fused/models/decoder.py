"""The decoder: ``glm_moe_dsa`` and ``deepseek_v32`` as mlx-lm loads and calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList

from .. import ops
from ..formats.kv_rows import check_kv_format
from ..formats.weights import Format
from ..ops import routes
from .cache import Span, empty_cache, make_cache
from .cache_check import check_cache
from .chains import Decoding, Drafting
from .config import ModelArgs
from .decode_step import DecodeSteps
from .indexer import every_key
from .layer import DecoderLayer
from .layer_spec import DECODER
from .layers import Embedding, Linear, QuantizedEmbedding, RMSNorm, is_recordable
from .mtp import MtpLayer, check_draft
from .ranks import Ranks
from .rope import ROWS_PAGE, Angles, Page, Rope
from .tensors import modules
from .tokens import check_length, check_tokens, embed


class Decoder(nn.Module):
    """Embedding, layers and final norm; after the layers comes that of MTP, if there is one."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = Embedding(args.vocab_size, args.hidden_size)
        self.layers = [
            DecoderLayer(args, layer) if layer.role == DECODER else MtpLayer(args, layer)
            for layer in args.model_layers
        ]
        self.here = slice(0, len(args.layers))
        self.norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self._rope = Rope(args.rope, args.qk_rope_head_dim)
        self._vocabulary, self._context = args.vocab_size, args.max_position_embeddings

    def __call__(
        self, tokens: mx.array, cache: Sequence[Any] | None, trace: list[mx.array] | None
    ) -> mx.array:
        """The normed hidden states [b, l, hidden] of integer tokens [b, l]."""
        span = Span.of(cache, tokens.shape[1])
        angles = self.angles(span)
        return self.run(self.embed(tokens), span, angles, cache, trace)

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers that a token goes through here: all, but for a rank of a line."""
        return self.layers[self.here]

    @property
    def own_layers(self) -> list[DecoderLayer]:
        """All layers that are here, with that of MTP."""
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    @property
    def mtp(self) -> MtpLayer:
        """The layer that predicts one token more, of a model that has it."""
        return cast(MtpLayer, self.layers[-1])

    def angles(self, span: Span) -> Angles:
        """The angles of a span, whose length is checked."""
        # A GPU's cosines have other bits; on the CPU the caller's stream is the right one.
        with routes.on(mx.cpu if routes.is_gpu(None) else None):
            if span.start is None:
                return self.page(span).of_span(span.first, span.length)
            check_length(span.first, span.length, self._context)
            return self._rope.angles(span.positions())

    def page(self, span: Span) -> Page:
        """The angles of a span's columns and maybe of some around it; its length is checked."""
        check_length(span.first, span.length, self._context)
        if span.start is None:
            return self._rope.page_of_span(span.first, span.length)
        length = max(span.length, min(ROWS_PAGE, self._context - span.first))
        page = Page(span.first, self._rope.angles(span._replace(length=length).positions()))
        mx.eval(*page.angles)
        return page

    def embed(self, tokens: mx.array) -> mx.array:
        """The rows [b, l, hidden] of tokens [b, l], which are checked."""
        return embed(self.embed_tokens, tokens, self._vocabulary)

    def run(
        self,
        x: mx.array,
        span: Span,
        angles: Angles,
        cache: Sequence[Any] | None,
        trace: list[mx.array] | None = None,
    ) -> mx.array:
        """The normed hidden states [b, l, hidden] of embedded tokens of the same shape."""
        selection = None
        for i, layer in enumerate(self.decoder_layers):
            layer_cache, full = None if cache is None else cache[i], "indexer" in layer.self_attn
            selection = None if full else selection
            x, selection = layer(x, span, angles, layer_cache, selection)
            if trace is not None and full:
                trace.append(every_key(x.shape, span) if selection is None else selection)
        return self.norm(x)


class Model(nn.Module):
    """A causal language model; mlx-lm's model protocol plus ``trace``."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = Decoder(args)
        if not args.tie_word_embeddings:
            self.lm_head = Linear(args.hidden_size, args.vocab_size)
        self._steps, self._drafts = DecodeSteps(Decoding()), DecodeSteps(Drafting())
        self.prefill_step_size: int | None = None  # tokens of a prompt at a time; None: as fits
        self.ranks: Ranks | None = None  # that share the model; None: it is all here

    def __call__(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        *,
        trace: list[mx.array] | None = None,
    ) -> mx.array:
        """The logits [b, l, vocab] of integer tokens [b, l]; ``cache`` is updated in place.

        A ``trace`` list receives, per full layer in order, the indexer's choice: int32
        [b, l, min(topk, t)], ascending columns of the cache. A query with fewer visible keys
        than that also has entries of -1.

        Raises ValueError for tokens of another kind or outside the vocabulary, for caches of
        another model, and where cached and new tokens exceed ``max_position_embeddings``. Where
        tokens are not evaluated yet, one outside the vocabulary raises when the logits are
        evaluated on the CPU; on a GPU its logits are NaN.
        """
        logits, _ = self.states(tokens, cache, trace=trace)
        return logits

    def states(
        self,
        tokens: mx.array,
        cache: Sequence[Any] | None = None,
        *,
        trace: list[mx.array] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """The logits that a call gives, and the normed hidden states [b, l, hidden] behind them."""
        found = None if trace is not None else self._steps.again(self, tokens, cache)
        if found is None:
            check_tokens(tokens)
            if cache is not None:
                check_cache(cache, self.args, tokens.shape[0], self.args.layers)
            found = self.forward(tokens, cache, trace)
        return self.completed(found)

    def completed(self, found: list[mx.array]) -> tuple[mx.array, mx.array]:
        """Logits and hidden states of what `forward` gave; ranks of a line have to ask others."""
        logits, hidden = found
        return logits, hidden

    def outputs(self, hidden: mx.array) -> list[mx.array]:
        """What `forward` gives of normed hidden states [b, l, hidden]."""
        return [self.head(hidden), hidden]

    def draft(
        self,
        tokens: mx.array,
        hidden: mx.array,
        cache: CacheList,
        selection: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """What the MTP layer predicts to follow integer tokens [b, l]; ``cache`` is updated.

        Row i takes tokens[:, i] and hidden[:, i], which is the normed hidden state of the position
        before that token: of `states`, or for a draft of a draft what this gave for the last one.

        Args:
            tokens: as a call takes them.
            hidden: floats [b, l, hidden].
            cache: what `make_mtp_cache` made; `glm_fused.models.cache.trim` forgets its last rows.
            selection: int32 [b, l, k], what the first of several drafts gave; None: the layer's
                own, or every key.

        Returns:
            Logits [b, l, vocab], hidden states [b, l, hidden], and the last row's selection
            [b, 1, k] for the drafts that go on from it: None where the config does not share it
            (``index_share_for_mtp_iteration``) or every key is selected.

        Raises ValueError as a call does, and for a model without the layer.
        """
        given = (hidden,) if selection is None else (hidden, selection)
        found = self._drafts.again(self, tokens, [cache], given)
        if found is None:
            check_tokens(tokens)
            check_draft(self.args, tokens, hidden, selection)
            check_cache([cache], self.args, tokens.shape[0], self.args.mtp_layers[:1])
            found = self.forward_draft(tokens, given, cache)
        logits, hidden, *own = found
        selection = own[0] if own else selection
        if selection is None or not self.args.index_share_for_mtp_iteration:
            return logits, hidden, None
        return logits, hidden, selection if tokens.shape[1] == 1 else selection[:, -1:]

    def forward(
        self, tokens: mx.array, cache: Sequence[Any] | None, trace: list[mx.array] | None
    ) -> list[mx.array]:
        """What `states` does once its arguments are checked; a subclass may wrap it."""
        if trace is None and (found := self._steps.run(self, tokens, cache)) is not None:
            return found
        return self.outputs(self.model(tokens, cache, trace))

    def forward_draft(
        self, tokens: mx.array, given: Sequence[mx.array], cache: CacheList
    ) -> list[mx.array]:
        """What `Drafting.run` gives for checked arguments; a subclass may wrap it."""
        if (found := self._drafts.run(self, tokens, [cache], given)) is not None:
            return found
        x, span = self.model.embed(tokens), Span.of([cache], tokens.shape[1])
        return Drafting().run(self, x, given, span, self.model.angles(span), [cache])

    def head(self, x: mx.array) -> mx.array:
        """The logits [b, l, vocab] of normed hidden states [b, l, hidden]."""
        if "lm_head" in self:
            return self.lm_head(x)
        embedding = self.model.embed_tokens
        if "weight" not in embedding:  # it has a trained adapter
            return embedding.as_linear(x)  # type: ignore[no-any-return]
        return ops.quantized_matvec(x, embedding.as_weight())

    def has_recordable_head(self) -> bool:
        """Whether a decode step can be recorded of the head: no adapter in training."""
        if "lm_head" in self:
            return is_recordable(self.lm_head)
        return isinstance(self.model.embed_tokens, Embedding | QuantizedEmbedding)

    @property
    def context(self) -> int:
        """How many tokens a prompt and what follows it may have."""
        return self.args.max_position_embeddings

    @property
    def weight_bytes(self) -> int:
        """The bytes of weights in memory."""
        arrays = tree_flatten(self.parameters(), destination={})
        return sum(array.nbytes for array in dict(arrays).values())

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder's layers, where mlx-lm looks for them."""
        return self.model.decoder_layers

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters ``mlx_lm.convert --dtype`` may cast."""
        return lambda name: not name.endswith("e_score_correction_bias")

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Which modules ``mlx_lm.convert -q`` quantizes; routers and indexers stay as they are."""
        kept = {module.path for module in modules(self.args) if module.sensitive}
        return lambda path, module: path not in kept

    @property
    def kv_format(self) -> str:
        """How new caches store keys: one of `glm_fused.formats.kv_rows`, ``auto`` at first.

        Setting another name raises ValueError.
        """
        return self.layers[0].self_attn.kv_format

    @kv_format.setter
    def kv_format(self, name: str) -> None:
        check_kv_format(name)
        for layer in self.model.own_layers:
            layer.self_attn.kv_format = name
            if "indexer" in layer.self_attn:
                layer.self_attn.indexer.kv_format = name

    def make_mtp_cache(self) -> CacheList:
        """The cache of the MTP layer, whose rows are those of its drafts, in ``kv_format``."""
        return empty_cache(self.args.mtp_layers[0])

    def make_cache(self) -> list[CacheList]:
        """One ``CacheList`` per layer: two ``KVCache`` on full layers, one on shared ones."""
        return make_cache(self.args)

    def sanitize(
        self, weights: dict[str, mx.array], formats: Mapping[str, Format] | None = None
    ) -> dict[str, mx.array]:
        """Checkpoint tensors under the names and shapes of this model's parameters."""
        from .sanitize import sanitize

        return sanitize(weights, self.args, formats or {})
