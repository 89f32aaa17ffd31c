"""Several prompts continued at once, each with the text that it has alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...models.decoder import Model
from ..decoding import settled
from ..drafts.options import DraftOptions
from ..ending import Text
from ..options import Options
from ..planning import plan_prompt
from ..prompts import room
from .filling import Filling, Prompt
from .microbatches import batch_of, count_of
from .requests import Event, GeneratedToken, GenerationRequest
from .rows import Row


@dataclass(frozen=True)
class Answer:
    """One text of a batch; ``tokens`` and ``finish_reason`` are those of a `Completion`."""

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int


@dataclass(frozen=True)
class BatchCompletion:
    """The texts of a batch in the order of their prompts, and how long they took.

    ``drafts`` is as in a `Completion`; a step's tokens are those that all texts got.
    """

    answers: list[Answer]
    prompt_seconds: float
    generation_seconds: float
    drafts: dict[str, Any] | None


def generate_batch(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[list[int]],
    options: Options,
    drafts: DraftOptions | None = None,
) -> BatchCompletion:
    """Continue several prompts at once, on the current path; each text has the tokens it has alone.

    Args:
        prompts: the checked tokens of each.
        options: how to generate, for all; with a seed each text draws what it draws alone.
        drafts: which tokens to guess ahead; None: none.

    Raises ValueError where there is no prompt, or the longest and ``max_tokens`` exceed the
    context, and RuntimeError where an expert cannot be read.
    """
    if not prompts:
        raise ValueError("[generate] there are no prompts, expected at least one.")
    longest = max(map(len, prompts))
    max_tokens = room(model, longest, options.max_tokens)
    options = replace(options, max_tokens=max_tokens)
    texts, rows = [_Collected() for _ in prompts], []
    for prompt, text in zip(prompts, texts, strict=True):
        ending = Text(tokenizer, options.stop, max_tokens)
        request = GenerationRequest(prompt, options)
        rows.append(Row(request, model.args.vocab_size, ending, text.take))
    size = plan_prompt(model, longest + max_tokens).prefill_step_size
    batch, count = batch_of(model, drafts), count_of(model, drafts)
    streams = cast(list[mx.Stream], [generation_stream])
    with settled(), wired_limit(model, streams):
        began = time.perf_counter()
        for i in range(min(count, len(rows))):
            together = [Prompt(row, model.make_cache(), 0) for row in rows[i::count]]
            filling = Filling(model, together, drafts)
            while filling.left:
                filling.take(size)
            batch.join(filling.rows, filling.cache, filling.drafts)
        prompted = time.perf_counter()
        while batch.rows:
            batch.leave(batch.step())
    ended = time.perf_counter()
    answers = [text.answer(row) for text, row in zip(texts, rows, strict=True)]
    times = prompted - began, ended - prompted
    return BatchCompletion(answers, *times, batch.describe_drafts())


class _Collected:
    """The text of a row's events."""

    def __init__(self) -> None:
        self._text = ""

    def take(self, event: Event) -> None:
        if isinstance(event, GeneratedToken):
            self._text += event.text

    def answer(self, row: Row) -> Answer:
        if row.error is not None:
            raise row.error
        assert row.reason is not None
        new = row.known[row.prompt_tokens :]
        return Answer(self._text, new, row.reason, row.prompt_tokens)
