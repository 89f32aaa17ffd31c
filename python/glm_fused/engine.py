"""A session with one model: what the command line does, for whoever uses the library."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import CacheList
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checkpoint.identity import checkpoint_id
from .checkpoint.paths import checkpoint_path
from .checkpoint.prompt_cache import load_prompt_cache
from .drafting import draft_options, draft_source
from .engine_options import EngineOptions
from .generation.batching.batches import BatchCompletion, generate_batch
from .generation.drafts.options import DraftOptions
from .generation.generate import Completion, OnProgress, Piece, generate, stream_generate
from .generation.kept_cache import Caches
from .generation.limits import MIXED, MTP
from .generation.options import Options, changed_options, defaults_of
from .generation.prompt_cache.store import DISK_BYTES, PromptStore
from .generation.prompts import Prompt, encode
from .generation.tokenizer import load_tokenizer
from .loader import Opened, open_model
from .models.cache import Span
from .models.cache_check import check_cache
from .models.decoder import Model
from .models.kernels import OnCompile, unseen
from .models.tokens import check_tokens
from .streaming.banks import Streaming
from .streaming.model import streaming_of


class Engine:
    """A model with its tokenizer, caches and limits, loaded strictly and within its budget.

    It is a context manager, and leaving it closes the engine. Several threads may share one, each
    with a cache of its own.

        with glm_fused.Engine("demo") as engine:
            print(engine.generate("def main():", max_tokens=40).text)

    Attributes:
        path: the folder of the checkpoint, or its first GGUF file.
        config: its config.json, with the stop tokens of generation_config.json.
        options: how it was loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: EngineOptions | None = None,
        *,
        lazy: bool = False,
        tokenizer: bool = True,
        only_mlx_formats: bool = False,
        compile_kernels: bool = True,
        on_compile: OnCompile = unseen,
    ):
        """Load the checkpoint that ``path`` names.

        Args:
            path: a folder or a GGUF file, of shards the first; "demo" is the bundled model where
                there is no folder of that name.
            options: how to load it; None keeps all of it in memory, and caches in the type of the
                activations.
            lazy: read parameters when they are first used, without a check of scales for NaN.
            tokenizer: load the tokenizer too; generating needs it, `step` does not.
            only_mlx_formats: have weights in formats that MLX does not know become dense, in
                bfloat16, and `config` say so, for what trains or saves the model.
            compile_kernels: on Metal, compile now what steps and prompts will launch.
            on_compile: called with how many kernels are compiled, from 0 on, and of how many.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: something does not fit; the message names file and tensor with what was
                found and expected, or the budget with what would fit.
            RuntimeError: a parameter, which the message names, cannot be read.
        """
        self.options = EngineOptions() if options is None else options
        found = checkpoint_path(path)
        if tokenizer and found.is_dir() and not (found / "tokenizer_config.json").exists():
            raise FileNotFoundError(f"{found} has no tokenizer_config.json.")
        source = draft_source(self.options, found)
        opened = open_model(
            found,
            self.options.kv_format,
            self.options.stream_options(),
            self.options.prefill_step_size,
            only_mlx_formats,
            mtp=source in (MTP, MIXED),
            ranks=self.options.ranks,
        )
        self.path: Path = opened.checkpoint.path
        self.config: dict[str, Any] = opened.config
        self._opened: Opened | None = opened
        self._tokenizer: TokenizerWrapper | None = None
        self._drafts: DraftOptions | None = None
        try:
            if tokenizer:
                self._tokenizer = load_tokenizer(opened.checkpoint)
            if not lazy:
                opened.read()
            if source is not None:
                depth = self.options.draft
                self._drafts = draft_options(depth, source, opened.model, self._tokenizer)
            if compile_kernels:
                opened.compile(on_compile)
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> Model:
        """The model. Raises ValueError once the engine is closed."""
        if self._opened is None:
            raise ValueError(f"[engine] the engine of {self.path} is closed.")
        return self._opened.model

    @property
    def tokenizer(self) -> TokenizerWrapper:
        """The tokenizer. Raises ValueError where it was not loaded or the engine is closed."""
        if self._tokenizer is None:
            state = "closed" if self._opened is None else "without its tokenizer"
            raise ValueError(f"[engine] the engine of {self.path} is {state}.")
        return self._tokenizer

    @property
    def streaming(self) -> Streaming | None:
        """Plan, source and counters of streamed experts; None where all are in memory."""
        return streaming_of(self.model)

    @property
    def context(self) -> int:
        """How many tokens a prompt and what follows may have; with streaming, those planned for."""
        return self.model.context

    @property
    def defaults(self) -> Options:
        """How the checkpoint asks for text to be generated."""
        return defaults_of(self.model)

    @property
    def drafts(self) -> DraftOptions | None:
        """Which tokens `generate` and `stream` guess ahead; None where they do not."""
        return self._drafts

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """The prompt's tokens, checked; prompt, ``raw`` and errors are `glm_fused.generate`'s."""
        return encode(self.model, self.tokenizer, prompt, raw)

    def generate(
        self,
        prompt: Prompt,
        options: Options | None = None,
        on_text: Callable[[str], None] = lambda text: None,
        *,
        raw: bool = False,
        on_progress: OnProgress = lambda what, done, total: None,
        **changes: Any,
    ) -> Completion:
        """Continue a prompt; arguments, result and errors are those of `glm_fused.generate`."""
        return generate(
            self.model,
            self.tokenizer,
            prompt,
            options,
            on_text,
            raw=raw,
            on_progress=on_progress,
            drafts=self.drafts,
            **changes,
        )

    def stream(
        self,
        prompt: Prompt,
        options: Options | None = None,
        *,
        raw: bool = False,
        on_progress: OnProgress = lambda what, done, total: None,
        caches: Caches | None = None,
        **changes: Any,
    ) -> Iterator[Piece]:
        """Continue a prompt piece by piece, as `glm_fused.stream_generate` does."""
        return stream_generate(
            self.model,
            self.tokenizer,
            prompt,
            options,
            raw=raw,
            on_progress=on_progress,
            drafts=self.drafts,
            caches=caches,
            **changes,
        )

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        options: Options | None = None,
        *,
        raw: bool = False,
        **changes: Any,
    ) -> BatchCompletion:
        """Continue several prompts at once; each text has the tokens that it has alone.

        Arguments and errors are those of `generate`, for each prompt. Together the longest prompt
        and ``max_tokens`` must fit in the context.
        """
        tokens = [self.encode(prompt, raw=raw) for prompt in prompts]
        chosen = changed_options(self.defaults if options is None else options, changes)
        return generate_batch(self.model, self.tokenizer, tokens, chosen, self.drafts)

    def make_cache(self) -> list[CacheList]:
        """An empty cache for `step`, with one entry per layer, in the engine's ``kv_format``."""
        return self.model.make_cache()

    def load_cache(self, path: str | os.PathLike[str]) -> list[CacheList]:
        """A prompt cache from a .safetensors file that mlx-lm's ``save_prompt_cache`` wrote.

        Raises FileNotFoundError for a missing file and ValueError, naming the file or layer, for
        one that is no prompt cache, or another model's.
        """
        return load_prompt_cache(path, self.model.args)

    def prompt_store(
        self,
        limit_bytes: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        disk_bytes: int = DISK_BYTES,
    ) -> PromptStore:
        """A store of the model's caches, of which up to ``limit_bytes`` are in memory.

        None stands for ``options.prompt_cache``, which a memory budget counts. With a ``folder``
        there are those that earlier stores kept there, and up to ``disk_bytes`` are kept. Raises
        ValueError, naming what differs, for a folder of another model or format, or one that
        another process has, and OSError where the checkpoint or folder cannot be read.
        """
        limit = self.options.prompt_cache_bytes if limit_bytes is None else limit_bytes
        opened = None if folder is None else self._opened
        model_id = None if opened is None else checkpoint_id(opened.checkpoint)
        return PromptStore(self.model, limit, folder, model_id=model_id, disk_bytes=disk_bytes)

    def step(self, tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Run one forward of the model, on the current path.

        Args:
            tokens: integers [batch, length], each in [0, vocabulary).
            cache: what `make_cache` or `load_cache` gave, updated in place; None stands for no
                earlier tokens.

        Returns:
            Logits [batch, length, vocabulary] in the type of the activations, not yet evaluated.

        Raises:
            ValueError: tokens or cache are of another kind, or together exceed `context`.
            RuntimeError: when the result is evaluated on the CPU, a token that was not evaluated
                yet is outside the vocabulary; an expert cannot be read.
        """
        if self.context < self.model.args.max_position_embeddings:  # else the model itself refuses
            self._check_room(tokens, cache)
        logits: mx.array = self.model(tokens, cache)
        return logits

    def _check_room(self, tokens: mx.array, cache: Sequence[Any] | None) -> None:
        check_tokens(tokens)
        if cache is not None:
            check_cache(cache, self.model.args, tokens.shape[0], self.model.args.layers)
        span = Span.of(cache, tokens.shape[1])
        if span.total > self.context:
            raise ValueError(
                f"[engine] {span.first} cached and {span.length} new tokens, expected at most"
                f" {self.context}, for which memory was planned (context plans for more)."
            )

    def close(self) -> None:
        """Let go of model and tokenizer, and give MLX back its limit of cached memory.

        What else refers to the model keeps it in memory. Closing twice is no error.
        """
        if self._opened is not None:
            self._opened.restore_limit()
        self._opened = self._tokenizer = self._drafts = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
