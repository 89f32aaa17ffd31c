"""What the scheduler's thread does next: a chunk of a prompt, or a step of all texts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...host import settle
from ...models.decoder import Model
from ...streaming.model import streaming_of
from ..drafts.options import DraftOptions
from ..ending import Text
from ..planning import plan_prompt
from ..tidying import tidy
from .capacity import Capacity
from .filling import Filling
from .groups import Unbegun
from .jobs import Job
from .keeping import Keeping, Store
from .microbatches import batch_of, count_of
from .rates import Rate
from .requests import OnEvent
from .rows import Row

BESIDE = 512  # tokens of a prompt at a time while others are decoded


class Turn(NamedTuple):
    """What is next: a step, or a ``chunk`` of prompts, which ``gathers`` those not begun before."""

    chunk: bool
    gathers: bool


class Turns:
    """The requests that are generated for, in the scheduler's thread.

    While some are decoded and others' prompts taken, prompts get half of the time, or more where
    they are more than what is decoded: then every text has an equal part. There is a step between
    any two chunks of prompts. Prompts take turns, too; those that have not begun and have similarly
    many tokens left are taken together, and wait a little for requests that are ``coming``, in
    milliseconds. ``after_events`` is called once a chunk or a step has told all its events.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        drafts: DraftOptions | None,
        max_batch: int,
        store: Store | None,
        after_events: Callable[[], None],
    ):
        self._model, self._tokenizer, self._drafts = model, tokenizer, drafts
        self._max_batch, self._after_events = max_batch, after_events
        self._keeping = Keeping(model, store)
        self._weight_bytes = model.weight_bytes
        self._capacity = Capacity(model, self._keeping.limit_bytes)
        self._unbegun, self._filling = Unbegun(count_of(model, drafts)), deque[Filling]()
        self._jobs: dict[Row, Job] = {}
        self._batch = batch_of(model, drafts)
        self._beginning = 0  # requests that are not in the queue any more, nor here yet
        self._chunk_seconds = self._step_seconds = 0.0  # of the last chunk, and of steps after it
        self._prompts, self._generated, self._cached = Rate(), Rate(), 0
        self._ended = dict.fromkeys(("finished", "failed", "cancelled"), 0)

    @property
    def busy(self) -> bool:
        """Whether there is any request."""
        return bool(self._unbegun.prompts or self._filling or self._batch.rows)

    def rest(self) -> None:
        """There is nothing to do for now: MLX lets go of memory that it keeps."""
        tidy(self._model)

    def next_of(self, queue: deque[Job]) -> Job | None:
        """The first request of a queue, taken from it; None while there is no room for it."""
        while queue and queue[0].over:
            queue.popleft()
            self._ended["cancelled"] += 1
        if not queue:
            return None
        request = queue[0].request
        lengths = [row.most for row in self._jobs]
        lengths.append(len(request.tokens) + (request.options.max_tokens or 0))
        if len(lengths) > self._max_batch or not self._capacity.has_room(lengths):
            return None
        self._beginning = 1
        return queue.popleft()

    def begin(self, job: Job) -> None:
        """Begin with a request, for which there is room."""
        try:
            self._begin(job)
        finally:
            self._beginning = 0
            self._after_events()

    def _begin(self, job: Job) -> None:
        request, options = job.request, job.request.options
        assert options.max_tokens is not None
        try:
            ending = Text(self._tokenizer, options.stop, options.max_tokens)
            row = Row(request, self._model.args.vocab_size, ending, self._teller(job))
            prompt = self._keeping.beginning(row)
        except Exception as error:
            self._ended["failed"] += job.fail(error)
            return
        self._jobs[row] = job
        self._unbegun.add(prompt)

    def _teller(self, job: Job) -> OnEvent:
        """What gets a text's events; what it raises ends the text."""
        return job.tell

    def pause(self, coming: int) -> float:
        """How many seconds to do nothing, as all that is here waits for requests on their way."""
        return 0.0 if self._filling or self._batch.rows else self._patience(coming)

    def _patience(self, coming: int) -> float:
        """How many seconds prompts that have not begun still wait for requests on their way."""
        some = coming and len(self._jobs) < self._max_batch
        return self._unbegun.patience() if some else 0.0

    def turn(self, coming: int) -> None:
        """A chunk of prompts or a step, and what follows from it."""
        self._drop(self._gone())
        self._take(self._next(coming))

    def _next(self, coming: int) -> Turn:
        chunk = self._prompts_are_next(coming)
        return Turn(chunk, chunk and not self._patience(coming))

    def _take(self, turn: Turn) -> None:
        if turn.chunk:
            self._chunk(turn.gathers)
        elif self._batch.rows:
            self._step()
        self._after_events()

    def _prompts_are_next(self, coming: int) -> bool:
        waiting, decoded = self._waiting(), len(self._batch.rows)
        share = min(1.0, decoded / max(1, waiting))
        ready = self._filling or (self._unbegun.prompts and not self._patience(coming))
        return bool(ready) and self._step_seconds >= self._chunk_seconds * share

    def _waiting(self) -> int:
        """How many texts there are whose prompts are taken, or will be."""
        return len(self._unbegun.prompts) + sum(len(each.rows) for each in list(self._filling))

    def fail_all(self, error: Exception) -> None:
        """End all requests with an error."""
        self._batch.abandon()
        self._filling.clear()
        self._unbegun.clear()
        self._end_all(list(self._jobs), error)
        self._after_events()

    def _fill(self, filling: Filling) -> None:
        """Take the rest of prompts, if there is any, in later turns; else decode what follows."""
        if filling.left:
            self._filling.append(filling)
            return
        if self._batch.is_ahead:
            self._step(ahead=False)
        self._batch.join(filling.rows, filling.cache, filling.drafts)

    def _chunk(self, gathers: bool) -> None:
        """Some tokens of the prompts whose turn it is."""
        if gathers:
            self._gather()
        if not self._filling:
            return
        began, filling = time.perf_counter(), self._filling.popleft()
        size = self._chunk_size(filling.rows)
        if self._batch.rows and streaming_of(self._model) is None:  # which reads all experts anew
            size = min(size, BESIDE)
        try:
            taken = filling.take(size) if filling.left else 0
        except Exception as error:
            self._check_survives(error)
            settle(generation_stream)
            self._end_all(filling.rows, error)
            return
        self._chunk_seconds = time.perf_counter() - began
        self._prompts.add(taken)
        self._fill(filling)
        self._step_seconds = 0.0

    def _gather(self) -> None:
        """Have the prompts that have not begun be taken, some of them together."""
        for prompts in self._unbegun.groups(lambda first: self._chunk_size([first.row])):
            rows = [prompt.row for prompt in prompts]
            try:
                self._filling.append(Filling(self._model, prompts, self._drafts))
            except Exception as error:
                self._check_survives(error)
                self._end_all(rows, error)
            else:
                self._cached += sum(row.from_store for row in rows)

    def _chunk_size(self, rows: Sequence[Row]) -> int:
        """How many tokens of these texts' prompts memory was planned for, taken at once."""
        most = max(row.most for row in rows)
        return plan_prompt(self._model, most, self._weight_bytes).prefill_step_size

    def _step(self, ahead: bool = True) -> None:
        began, before = time.perf_counter(), sum(len(row.known) for row in self._batch.rows)
        try:
            rows = self._batch.rows[:]
            over = self._batch.step(ahead)
        except Exception as error:
            self._check_survives(error)
            self._fail_batch(error)
            return
        self._generated.add(sum(len(row.known) for row in rows) - before)
        self._leave(over)
        self._step_seconds += time.perf_counter() - began

    def _leave(self, rows: Sequence[Row]) -> None:
        """These texts are decoded no longer; the store gets their caches."""
        if not rows:
            return
        self._after_events()  # their last ones need not wait
        for row in rows:
            if self._keeping.wanted and row.cached:
                self._keeping.keep(*self._batch.cache_of(row))
        self._batch.leave(rows)
        for row in rows:
            self._end(row, row.error)

    def _end(self, row: Row, error: Exception | None) -> None:
        """A text is at its end."""
        job = self._jobs.pop(row)
        if error is not None:
            self._ended["failed"] += job.fail(error)
        else:
            self._ended["cancelled" if row.reason is None else "finished"] += 1

    def _end_all(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            self._end(row, error)

    def _fail_batch(self, error: Exception) -> None:
        settle(generation_stream)
        self._end_all(self._batch.abandon(), error)

    def _check_survives(self, error: Exception) -> None:
        """Raise what the model raised where other requests cannot go on after it."""

    def _gone(self) -> set[Row]:
        """The texts that were cancelled or failed."""
        return {row for row, job in self._jobs.items() if job.over or row.error is not None}

    def _drop(self, gone: set[Row]) -> None:
        """Let go of texts; one whose prompt is taken with others' stays until all that is done."""
        if not gone:
            return
        self._leave([row for row in self._batch.rows if row in gone])
        for filling in [each for each in self._filling if gone.issuperset(each.rows)]:
            self._filling.remove(filling)
            for row in filling.rows:
                if self._keeping.wanted and row.cached:
                    self._keeping.keep(*filling.cache_of(row))
                self._end(row, row.error)
        for row in gone.intersection(prompt.row for prompt in self._unbegun.prompts):
            self._unbegun.remove(row)
            self._end(row, row.error)

    def describe(self) -> dict[str, Any]:
        """What goes on now and what was done so far, JSON-ready; from any thread."""
        batch, filling = self._batch, list(self._filling)
        return {
            "active": len(self._jobs) + self._beginning,
            "filling": self._waiting(),
            **self._ended,
            "not_stored": self._keeping.failures,
            "prompt_tokens": self._prompts.total,
            "cached_tokens": self._cached,
            "tokens_generated": self._generated.total,
            "prompt_tokens_per_second": self._prompts.of_late(),
            "tokens_per_second": self._generated.of_late(),
            "memory": {
                "weights": self._weight_bytes,
                "caches": batch.nbytes
                + self._unbegun.nbytes
                + sum(each.nbytes for each in filling),
                "store": self._keeping.nbytes,
                "active": mx.get_active_memory(),
                "peak": mx.get_peak_memory(),
            },
            "drafts": batch.describe_drafts(),
            "prompt_cache": self._keeping.describe(),
        }
