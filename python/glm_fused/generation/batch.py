"""Several texts at once, with or without drafts, each with the tokens that it has alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.models.cache import BatchKVCache, CacheList
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..models.cache import trim
from ..models.decoder import Model
from ..ops.blocks import MAX_TOKENS
from ..streaming.experts import check_reads
from .choice import Choice, kept
from .decoding import settled
from .drafts.depth import Plan
from .drafts.options import DraftOptions
from .drafts.statistics import Statistics
from .ending import Text
from .options import Options
from .planning import plan_prompt
from .prompts import room


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


class Row:
    """A text that is not at its end: its known tokens, of which the cache has the first."""

    def __init__(self, prompt: list[int], options: Options, vocabulary: int, text: Text):
        self.known, self.prompt_tokens, self.cached = list(prompt), len(prompt), len(prompt) - 1
        self.choice = Choice(options, vocabulary, self.known)
        self.text, self.reason, self._ending = "", "", text

    @property
    def ahead(self) -> list[int]:
        """The known tokens that the cache does not have, at least one."""
        return self.known[self.cached :]

    def extend(self, tokens: Sequence[int]) -> list[int]:
        """Go on with ``tokens``, up to where the text ends; returns those that are part of it."""
        for count, token in enumerate(tokens, 1):
            self.known.append(token)
            text, reason = self._ending.feed(token)
            self.text += text
            if reason is not None:
                self.reason = reason
                return list(tokens[:count])
        return list(tokens)

    def answer(self) -> Answer:
        new = self.known[self.prompt_tokens :]
        return Answer(self.text, new, self.reason, self.prompt_tokens)


class Batch:
    """Decodes several texts side by side, in caches that are padded on the left.

    Of a step's drafts every text keeps what is right. The cache keeps the columns that all have
    got; what a text has got besides is known, and takes the place of drafts in the next step. So
    no text waits for another to be checked, and nothing is moved within a cache.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        prompts: Sequence[list[int]],
        options: Options,
        max_tokens: int,
        drafts: DraftOptions | None,
    ):
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        self._model, self._step = model, plan_prompt(model, longest + max_tokens).prefill_step_size
        self._cache = [_padded(layer, padding) for layer in model.make_cache()]
        self._rows = [
            Row(prompt, options, model.args.vocab_size, Text(tokenizer, options.stop, max_tokens))
            for prompt in prompts
        ]
        self._all, self._left = list(self._rows), max_tokens
        self._drafts = None if drafts is None else drafts.row_drafts(model, padding)
        self._depth = None if drafts is None else drafts.chooser(model)
        self.statistics = Statistics()

    def take_prompts(self) -> None:
        """All tokens of the prompts but the last of each."""
        longest = max(row.prompt_tokens for row in self._rows)
        rows = [[0] * (longest - len(row.known)) + row.known for row in self._rows]
        if self._drafts is not None:
            self._drafts.start([row.known for row in self._rows])
        size = max(1, self._step // len(rows))
        for first in range(0, longest - 1, size):
            last = min(first + size, longest - 1)
            with mx.stream(generation_stream):
                _, hidden = self._forward(mx.array([row[first:last] for row in rows]))
                primed: list[Any] = []
                if self._drafts is not None and hidden is not None:
                    following = mx.array([row[first + 1 : last + 1] for row in rows])
                    primed = self._drafts.prime(following, hidden)
                mx.eval([layer.state for layer in self._cache], primed)
            check_reads(self._cache)
            mx.clear_cache()

    def run(self) -> list[Answer]:
        """Decode until every text is at its end."""
        while self._rows:
            began = time.perf_counter()
            plan = self._next_drafts()
            advanced = self._round(plan.depth if plan else 0)
            check_reads(self._cache)
            seconds = time.perf_counter() - began
            self.statistics.count(advanced, seconds)
            if plan is not None and self._depth is not None:
                self.statistics.count_drafts(plan.kind.source, plan.depth, advanced - 1)
                self._depth.count(plan, advanced - 1, seconds)
            elif self._depth is not None:
                self._depth.count_plain(seconds)
            self._drop_ended()
        return [row.answer() for row in self._all]

    def describe_drafts(self, drafts: DraftOptions | None) -> dict[str, Any] | None:
        """What became of drafts, JSON-ready; None where none were to be made."""
        if drafts is None or self._depth is None:
            return None
        return drafts.describe() | self.statistics.describe(self._depth.plain_seconds)

    def _next_drafts(self) -> Plan | None:
        if self._drafts is None or self._depth is None:
            return None
        left = max(self._left + row.prompt_tokens - len(row.known) for row in self._rows)
        columns = self._model.context - self._cache[0].size()
        most = min(left, columns, MAX_TOKENS // len(self._rows)) - 1
        return self._depth.next(self._drafts.kinds(), most)

    def _round(self, depth: int) -> int:
        """One step with so many drafts; returns by how many columns the cache has grown."""
        width = 1 + depth
        sure = [row.ahead[:width] for row in self._rows]
        with mx.stream(generation_stream):
            tokens = self._inputs(sure, depth)
            logits, hidden = self._forward(tokens)
            chosen = [self._judged(i, len(sure[i]), tokens, logits) for i in range(len(sure))]
            mx.eval(tokens, chosen)
        given, found, new, whole = cast(list[list[int]], tokens.tolist()), [], [], []
        for i, row in enumerate(self._rows):
            more = cast(list[int], chosen[i].tolist())
            stay = kept(given[i][len(sure[i]) :], more)
            del more[stay + 1 :]
            found.append(len(sure[i]) + stay)
            whole.append(row.ahead + more)
            new.append(row.extend(more))
        columns = min(found)
        trim(self._cache, width - columns)
        for row in self._rows:
            row.cached += columns
        if self._drafts is not None:
            with mx.stream(generation_stream):
                self._drafts.extend(new, [known[1 : columns + 1] for known in whole], hidden)
        return columns

    def _inputs(self, sure: list[list[int]], depth: int) -> mx.array:
        """The tokens [b, 1 + depth] of a step."""
        if not depth or self._drafts is None:
            return mx.array(sure, mx.uint32)
        ahead = [known[1:] for known in sure]
        draws = [row.choice.next for row in self._rows]
        draft = self._drafts.propose(ahead, depth, draws)
        first = mx.array([known[:1] for known in sure], mx.uint32)
        return mx.concatenate([first, draft], axis=1)

    def _judged(self, i: int, sure: int, tokens: mx.array, logits: mx.array) -> mx.array:
        """What row i goes on with beside its drafts; nothing where more than the step is known."""
        row = self._rows[i]
        if len(row.ahead) > tokens.shape[1]:
            return mx.zeros((0,), mx.uint32)
        return row.choice.judge(logits[i, sure - 1 :], tokens[i, sure:])

    def _forward(self, tokens: mx.array) -> tuple[mx.array, mx.array | None]:
        if self._drafts is not None and self._drafts.needs_hidden:
            return self._model.states(tokens, self._cache)
        return self._model(tokens, self._cache), None

    def _drop_ended(self) -> None:
        """Rows of texts that ended leave the caches."""
        stay = [i for i, row in enumerate(self._rows) if not row.reason]
        if len(stay) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in stay]
        if stay:
            for layer in self._cache:
                layer.filter(mx.array(stay))
            if self._drafts is not None:
                self._drafts.filter(stay)


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
    max_tokens = room(model, max(map(len, prompts)), options.max_tokens)
    batch = Batch(model, tokenizer, prompts, options, max_tokens, drafts)
    streams = cast(list[mx.Stream], [generation_stream])
    with settled(), wired_limit(model, streams):
        began = time.perf_counter()
        batch.take_prompts()
        prompted = time.perf_counter()
        answers = batch.run()
    ended = time.perf_counter()
    found = batch.describe_drafts(drafts)
    return BatchCompletion(answers, prompted - began, ended - prompted, found)


def _padded(layer: CacheList, padding: list[int]) -> CacheList:
    return CacheList(*(BatchKVCache(padding) for _ in layer.caches))
