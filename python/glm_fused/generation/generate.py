"""Generates text, at once or piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .. import _ext
from ..environment import debug, flag
from ..formats.kv_rows import format_of
from ..memory import peak_resident_bytes
from ..models.decode_routes import attention_routes, explain, mlp_routes, path_taken
from ..models.decoder import Model
from ..models.moe import MoE
from ..streaming.experts import check_reads
from .decoding import Decoding, Drafting, Stopped, settled
from .drafts.options import DraftOptions
from .ending import Text
from .kept_cache import Caches, KeptCache
from .options import Options, changed_options, defaults_of
from .planning import plan_prompt
from .prompts import Prompt, encode, room

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Piece:
    """One step of generation: its token, and the text that is ready to be shown.

    ``finish_reason`` is "stop" or "length" in the last piece, and None in the others.
    """

    text: str
    token: int
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """A generated text.

    ``path`` is "fused", "reference", or "fused, but …" with the ops that fell back and why.
    ``finish_reason`` is "length" where ``max_tokens`` or the context ended it, else "stop".
    ``tokens`` ends with the stop token, or the one that completed a stop text, of which ``text``
    has nothing. ``prompt_tps`` and ``generation_tps`` are tokens a second. ``peak_memory_bytes`` is
    the most that MLX held, in weights, cache, slots of experts and temporaries;
    ``peak_scratch_bytes`` is the most that kernels held besides those, and
    ``planned_memory_bytes`` what both together were planned to be, for a prompt of which the model
    takes ``prefill_step_size`` tokens at a time; ``peak_resident_bytes`` is the most that the
    process held. ``kv_bytes`` is what the cache of
    ``kv_tokens`` tokens has allocated, with room to grow. ``drafts`` says how many there were and
    what became of them; see `glm_fused.generation.drafts.statistics`.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    path: str
    prompt_tokens: int
    prompt_seconds: float
    prompt_tps: float
    generation_tps: float | None
    prefill_step_size: int
    planned_memory_bytes: int
    peak_memory_bytes: int
    peak_scratch_bytes: int
    peak_resident_bytes: int
    kv_format: str
    kv_bytes: int
    kv_tokens: int
    drafts: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """All of it, JSON-ready, with the number of tokens."""
        return asdict(self) | {"generation_tokens": len(self.tokens)}


def generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    options: Options | None = None,
    on_text: Callable[[str], None] = lambda text: None,
    *,
    raw: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    drafts: DraftOptions | None = None,
    **changes: Any,
) -> Completion:
    """Continue a prompt, on the current path.

    Args:
        model: what `glm_fused.load` returned.
        tokenizer: what `glm_fused.load` returned with it.
        prompt: a text, which becomes one user message where the model has a chat template; a list
            of messages ``{"role": …, "content": …}``; or tokens, a list or an integer array [n].
        options: how to generate; None follows the checkpoint's generation_config.json.
        on_text: gets each piece of text as it is ready.
        raw: do not apply the chat template to a text.
        on_progress: gets "prompt" or "generation", the tokens done and their total.
        drafts: which tokens to guess ahead, which changes how fast it is; None: none.
        changes: options by name in place of those in ``options``: ``max_tokens``, ``temp``,
            ``top_p``, ``top_k``, ``min_p``, ``repetition_penalty``, ``repetition_context_size``,
            ``stop``, ``seed``.

    Returns:
        The text, its tokens, why it ended, and speeds.

    Raises:
        ValueError: an option does not exist or cannot have its value; the prompt is empty, is not
            text, or has tokens that the model lacks; or the prompt and ``max_tokens`` together
            exceed the context.
        RuntimeError: an expert cannot be read.
    """
    run = _Run.of(model, tokenizer, prompt, raw, options, changes, on_progress, drafts)
    for piece in run.pieces():
        on_text(piece.text)
    return run.completion()


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    options: Options | None = None,
    *,
    raw: bool = False,
    on_progress: OnProgress = lambda what, done, total: None,
    drafts: DraftOptions | None = None,
    caches: Caches | None = None,
    **changes: Any,
) -> Iterator[Piece]:
    """Continue a prompt piece by piece, as the pieces are taken; arguments are `generate`'s.

    ``caches`` has the caches of earlier prompts, which are taken on from where they agree with this
    one, and gets this one's back; None: there are none. ``on_progress`` may raise
    `glm_fused.generation.decoding.Stopped`, which goes to the caller, and ``caches`` still get
    theirs.

    Returns:
        An iterator of one piece a token: its text, the token, and in the last piece why it ended.

    Raises:
        ValueError: `generate` would refuse an argument; the call itself raises it.
        RuntimeError: an expert cannot be read, which is raised as pieces are taken.
    """
    args = (model, tokenizer, prompt, raw, options, changes, on_progress, drafts, caches)
    return _Run.of(*args).pieces()


class _Run:
    """One generation and what was measured of it."""

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        prompt: Sequence[int],
        options: Options,
        on_progress: OnProgress,
        drafts: DraftOptions | None,
        caches: Caches,
    ):
        self._model, self._prompt, self._on_progress = model, list(prompt), on_progress
        max_tokens = room(model, len(prompt), options.max_tokens)
        self._options = options = replace(options, max_tokens=max_tokens)
        self._ending = Text(tokenizer, options.stop, max_tokens)
        self._plan = plan_prompt(model, len(prompt) + max_tokens)
        self._caches, self._drafts = caches, drafts
        self._kv, cached = caches.take(self._prompt)
        self._drafting = Drafting.of(drafts, model)
        self._decoding = Decoding(
            model, prompt, options, self._kv, self._plan.prefill_step_size, self._drafting, cached
        )
        self._text, self._finish_reason, self._prompt_seconds = "", "length", 0.0
        self._tokens: list[int] = []
        self._ticks: list[float] = []

    @classmethod
    def of(
        cls,
        model: Model,
        tokenizer: TokenizerWrapper,
        prompt: Prompt,
        raw: bool,
        options: Options | None,
        changes: dict[str, Any],
        on_progress: OnProgress,
        drafts: DraftOptions | None,
        caches: Caches | None = None,
    ) -> _Run:
        """The run that a caller asks for; raises ValueError where there can be none."""
        options = defaults_of(model) if options is None else options
        options = changed_options(options, changes)
        tokens = encode(model, tokenizer, prompt, raw)
        caches = KeptCache(model) if caches is None else caches
        return cls(model, tokenizer, tokens, options, on_progress, drafts, caches)

    def pieces(self) -> Iterator[Piece]:
        """Generate, and put the cache back unless it may be wrong."""
        try:
            yield from self._pieces()
        except (GeneratorExit, Stopped):
            self._put_back()
            raise
        self._put_back()

    def _put_back(self) -> None:
        held = [*self._prompt, *self._tokens][: self._kv[0].size()]
        self._caches.put(held, self._kv)

    def _pieces(self) -> Iterator[Piece]:
        debug_paths(self._model)
        mx.reset_peak_memory()
        _ext.reset_peak_scratch()
        began = time.perf_counter()
        streams = cast(list[mx.Stream], [generation_stream])
        steps = self._decoding.steps(lambda done, n: self._on_progress("prompt", done, n))
        with settled(), wired_limit(self._model, streams), closing(steps):
            for step in steps:
                check_reads(self._kv)
                self._count(step.token, began)
                text, reason = self._ending.feed(step.token)
                self._text += text
                self._finish_reason = reason or self._finish_reason
                yield Piece(text, step.token, reason)
                if reason is not None:
                    return

    def _count(self, token: int, began: float) -> None:
        self._ticks.append(time.perf_counter())
        self._prompt_seconds = self._prompt_seconds or self._ticks[0] - began
        self._tokens.append(token)
        self._on_progress("generation", len(self._tokens), self._options.max_tokens or 0)

    def completion(self) -> Completion:
        kv, ticks = self._kv, self._ticks
        return Completion(
            text=self._text,
            tokens=self._tokens,
            finish_reason=self._finish_reason,
            path=path_taken(self._model.args),
            prompt_tokens=len(self._prompt),
            prompt_seconds=self._prompt_seconds,
            prompt_tps=len(self._prompt) / self._prompt_seconds,
            generation_tps=ratio(len(ticks) - 1, ticks[-1] - ticks[0]),
            prefill_step_size=self._plan.prefill_step_size,
            planned_memory_bytes=self._plan.total,
            peak_memory_bytes=mx.get_peak_memory(),
            peak_scratch_bytes=_ext.peak_scratch_bytes(),
            peak_resident_bytes=peak_resident_bytes(),
            kv_format=format_of(kv[0][0].keys.dtype),
            kv_bytes=sum(layer.nbytes for layer in kv),
            kv_tokens=kv[0].size(),
            drafts=self._draft_statistics(),
        )

    def _draft_statistics(self) -> dict[str, Any] | None:
        if self._drafts is None or self._drafting is None:
            return None
        counted = self._decoding.statistics.describe(self._drafting.depth.plain_seconds)
        return self._drafts.describe() | counted


def debug_paths(model: Model) -> None:
    """Say which code runs the ops of each layer, and why, where ``GLM_FUSED_DEBUG`` is set."""
    if not flag("GLM_FUSED_DEBUG"):
        return
    for layer, spec in zip(model.layers, model.args.layers, strict=True):
        mlp = layer.mlp.switch_mlp if isinstance(layer.mlp, MoE) else layer.mlp
        weights = mlp.weights()
        formats = "/".join("adapted" if w is None else w.format.name for w in weights)
        kind = "experts" if spec.is_sparse else "dense mlp"
        routes = (*attention_routes(model.args, spec), *mlp_routes(model.args, spec, weights))
        line = "layer %d: %s indexer, %s %s: %s"
        debug(line, spec.index, spec.attention, kind, formats, explain(routes))


def ratio(a: float | None, b: float | None) -> float | None:
    """The ratio a / b, or None where either is missing or 0."""
    return a / b if a and b else None
