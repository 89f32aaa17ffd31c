"""Generates for many callers at once: requests from any thread, one thread that runs the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..models.decoder import Model
from ..streaming.experts import check_reads
from .choice import Choice
from .decoding import settled
from .drafts.options import DraftOptions
from .ending import Text
from .planning import plan_prompt
from .prompts import encode, room
from .requests import Event, Failure, GeneratedToken, GenerationRequest, OnEvent, PromptProgress

MOST_QUEUED = 256  # requests that wait, unless a caller says otherwise


class QueueFull(RuntimeError):
    """So many requests are waiting that another would wait too long."""


class EngineLike(Protocol):
    """What a scheduler needs of an engine."""

    @property
    def model(self) -> Model: ...

    @property
    def tokenizer(self) -> TokenizerWrapper: ...

    @property
    def drafts(self) -> DraftOptions | None: ...


class _Job:
    """A request and whom to tell; a `Ticket`."""

    def __init__(self, request: GenerationRequest, on_event: OnEvent):
        self.request, self._on_event = request, on_event
        self._lock, self.over = threading.RLock(), False

    def cancel(self) -> None:
        """End it where it is; no event follows."""
        with self._lock:
            self.over = True

    def tell(self, event: Event) -> None:
        """Pass an event on unless the request is over, which the last event makes it."""
        with self._lock:
            if self.over:
                return
            last = isinstance(event, Failure) or getattr(event, "finish_reason", None) is not None
            self.over = last
            self._on_event(event)


class Scheduler:
    """Takes requests from any thread and generates for them in a thread of its own.

    Args:
        engine: its model, tokenizer and drafts are used until `close`.
        max_batch: how many requests are generated for at a time.
        max_queue: how many more may wait.
    """

    def __init__(self, engine: EngineLike, *, max_batch: int = 16, max_queue: int = MOST_QUEUED):
        self._model, self._tokenizer = engine.model, engine.tokenizer
        self._max_queue = max_queue
        self._queue: deque[_Job] = deque()
        self._changed, self._closing = threading.Condition(), False
        self._active, self._counts = 0, dict.fromkeys(("prompt", "generated"), 0)
        self._thread = threading.Thread(target=self._run, name="glm-fused scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> _Job:
        """Queue a request; ``on_event`` is called from the scheduler's thread, and must be quick.

        Raises ValueError for a prompt that is empty or, with the tokens asked for, exceeds the
        context; `QueueFull` where too many wait; RuntimeError once the scheduler is closed.
        """
        tokens = encode(self._model, self._tokenizer, request.tokens)
        max_tokens = room(self._model, len(tokens), request.options.max_tokens)
        options = replace(request.options, max_tokens=max_tokens)
        job = _Job(replace(request, tokens=tokens, options=options), on_event)
        with self._changed:
            if self._closing:
                raise RuntimeError("[scheduler] it is closed.")
            if len(self._queue) >= self._max_queue:
                raise QueueFull(f"[scheduler] {self._max_queue} requests are waiting already.")
            self._queue.append(job)
            self._changed.notify()
        return job

    def describe(self) -> dict[str, Any]:
        """What goes on now and what was done so far, JSON-ready."""
        return {
            "active": self._active,
            "queued": len(self._queue),
            "prompt_tokens": self._counts["prompt"],
            "tokens_generated": self._counts["generated"],
        }

    def close(self) -> None:
        """End the thread; requests that are not at their end fail. Closing twice is no error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        streams = cast(list[mx.Stream], [generation_stream])
        with wired_limit(self._model, streams):
            while (job := self._next()) is not None:
                self._active = 1
                try:
                    with settled():
                        self._generate(job)
                except Exception as error:
                    self._fail(job, error)
                self._active = 0
        for job in self._queue:
            self._fail(job, RuntimeError("[scheduler] it is closed."))

    def _next(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._queue)
            return None if self._closing else self._queue.popleft()

    def _fail(self, job: _Job, error: Exception) -> None:
        try:
            job.tell(Failure(error))
        except Exception:  # whoever is told fails too: there is nobody else
            job.cancel()

    def _generate(self, job: _Job) -> None:
        request = job.request
        options, max_tokens = request.options, request.options.max_tokens
        assert max_tokens is not None
        known = list(request.tokens)
        choice = Choice(options, self._model.args.vocab_size, known)
        ending, constraint = Text(self._tokenizer, options.stop, max_tokens), request.constraint
        cache = self._model.make_cache()
        for done in self._prompt(known, cache, max_tokens):
            job.tell(PromptProgress(done, len(known), 0))
            if self._stops(job):
                return
        while not self._stops(job):
            with mx.stream(generation_stream):
                raw = self._model(mx.array([known[-1:]], mx.uint32), cache)[0]
                logits = raw
                if constraint is not None:
                    logits = mx.where(constraint.allowed(), raw, -mx.inf)
                token = cast(int, choice.next(logits).item())
            check_reads(cache)
            if len(known) == len(request.tokens):
                job.tell(PromptProgress(len(known), len(known), 0))
            known.append(token)
            self._counts["generated"] += 1
            if constraint is not None:
                constraint.accept(token)
            text, reason = ending.feed(token)
            logprob, top = _logprobs(raw[0], token, request.top_logprobs)
            job.tell(GeneratedToken(token, text, reason, logprob, top))

    def _stops(self, job: _Job) -> bool:
        if self._closing:
            self._fail(job, RuntimeError("[scheduler] it is closed."))
        return job.over

    def _prompt(self, known: list[int], cache: list[Any], max_tokens: int) -> Iterator[int]:
        """Take all tokens of a prompt but the last; gives the tokens done after each chunk."""
        step = plan_prompt(self._model, len(known) + max_tokens).prefill_step_size
        yield 0
        for first in range(0, len(known) - 1, step):
            chunk = known[first : min(first + step, len(known) - 1)]
            with mx.stream(generation_stream):
                self._model(mx.array([chunk], mx.uint32), cache)
                mx.eval([layer.state for layer in cache])
            check_reads(cache)
            self._counts["prompt"] += len(chunk)
            yield first + len(chunk)
            mx.clear_cache()


def _logprobs(
    logits: mx.array, token: int, count: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """A token's log-probability and those of the likeliest, of logits [vocabulary]."""
    if count is None:
        return None, ()
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits)
    best = mx.argsort(-logprobs)[:count] if count else mx.zeros((0,), mx.uint32)
    tokens = cast(list[int], best.tolist())
    values = cast(list[float], logprobs[best].tolist()) if count else []
    return cast(float, logprobs[token].item()), tuple(zip(tokens, values, strict=True))
