"""Generates for many callers at once: requests from any thread, one thread that runs the model."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...models.decoder import Model
from ...ops.blocks import MAX_TOKENS
from ...validation import show
from ..drafts.options import DraftOptions
from ..prompts import encode, room
from .jobs import Job
from .keeping import Store
from .leading import LeadingTurns, Others
from .requests import GenerationRequest, OnEvent, Ticket
from .turns import Turns

logger = logging.getLogger(__name__)
MOST_QUEUED = 256  # requests that wait, unless a caller says otherwise


class QueueFull(RuntimeError):
    """So many requests are waiting that another would wait too long."""


class SchedulerEnded(RuntimeError):
    """There is no thread any more that generates: it was closed, or an error ended it."""


class EngineLike(Protocol):
    """What a scheduler needs of an engine."""

    @property
    def model(self) -> Model: ...

    @property
    def tokenizer(self) -> TokenizerWrapper: ...

    @property
    def drafts(self) -> DraftOptions | None: ...


class Scheduler:
    """Takes requests from any thread and generates for them in a thread of its own.

    They are generated for together: each step of the model takes a token, or some with drafts, of
    every text, while prompts are taken in chunks between the steps. What a request gets does not
    depend on the others: its tokens are those of `glm_fused.generate`, with its seed if it samples.

    Args:
        engine: its model, tokenizer and drafts are used until `close`.
        max_batch: how many requests are generated for at a time, 1 to 16; fewer where memory has no
            room for their caches.
        max_queue: how many more may wait.
        store: keeps the caches of texts for those that begin alike; None: none is kept.
        after_events: called in the scheduler's thread after the events of a step or a chunk, for
            listeners that pass events on together. It must not raise.
        others: the other ranks that share the model, each of which runs `leading.follow`; None:
            there are none. The store may keep nothing in a folder then.

    Raises ValueError for numbers that there cannot be.
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        max_batch: int = MAX_TOKENS,
        max_queue: int = MOST_QUEUED,
        store: Store | None = None,
        after_events: Callable[[], None] = lambda: None,
        others: Others | None = None,
    ):
        for name, value, most in (
            ("max_batch", max_batch, MAX_TOKENS),
            ("max_queue", max_queue, 2**31 - 1),
        ):
            if type(value) is not int or not 1 <= value <= most:
                text = f"an integer from 1 to {most}"
                raise ValueError(f"[scheduler] {name} is {show(value)}, expected {text}.")
        self._model, self._tokenizer = engine.model, engine.tokenizer
        given = engine.model, engine.tokenizer, engine.drafts, max_batch, store, after_events
        self._turns = Turns(*given) if others is None else LeadingTurns(others, *given)
        self._others = others
        self._max_queue, self._queue = max_queue, deque[Job]()
        self._after_events = after_events
        self._changed, self._closing, self._coming = threading.Condition(), False, 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="glm-fused scheduler", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> Ticket:
        """Queue a request.

        ``on_event`` is called from the scheduler's thread, which waits for it. The last event is a
        token with a ``finish_reason``, or a `Failure`; what ``on_event`` raises ends the request.

        Raises ValueError for a prompt that is empty or, with the tokens asked for, exceeds the
        context; `QueueFull` where too many wait; `SchedulerEnded` once nothing is generated here.
        """
        tokens = encode(self._model, self._tokenizer, request.tokens)
        max_tokens = room(self._model, len(tokens), request.options.max_tokens)
        options = replace(request.options, max_tokens=max_tokens)
        job = Job(replace(request, tokens=tokens, options=options), on_event)
        with self._changed:
            if self._closing or not self.alive:
                raise self._ended()
            if self._waiting() >= self._max_queue:
                raise QueueFull(f"[scheduler] {self._max_queue} requests are waiting already.")
            self._queue.append(job)
            self._changed.notify()
        return job

    def expect(self, count: int) -> None:
        """So many more requests are on their way, or fewer where it is negative.

        They are those that will be submitted, or given up, within milliseconds: prompts that have
        not begun wait a little for them, as prompts are taken together in less time.
        """
        with self._changed:
            self._coming += count
            if not self._coming:
                self._changed.notify()

    def describe(self) -> dict[str, Any]:
        """What goes on now and what was done so far, JSON-ready.

        ``active`` requests are generated for, of ``filling`` ones among them the prompt is being
        taken, ``queued`` ones wait. ``tokens_per_second`` and ``prompt_tokens_per_second`` are of
        the last seconds, ``memory`` bytes by what they hold, ``drafts`` what became of them, None
        where there are none, and ``prompt_cache`` what the store says of itself.
        """
        with self._changed:
            queued = self._waiting()
        return {"queued": queued} | self._turns.describe()

    @property
    def alive(self) -> bool:
        """Whether there is a thread that generates."""
        return self._error is None and self._thread.is_alive()

    def close(self) -> None:
        """End the thread; requests that are not at their end fail. Closing twice is no error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _waiting(self) -> int:
        return sum(not job.over for job in self._queue)

    def _ended(self) -> SchedulerEnded:
        if self._error is None:
            return SchedulerEnded("[scheduler] it is closed.")
        return SchedulerEnded("[scheduler] an error has ended it.")

    def _run(self) -> None:
        try:
            with wired_limit(self._model, cast(list[mx.Stream], [generation_stream])):
                self._generate()
        except BaseException as error:  # whatever it is, nobody may wait for this thread any more
            logger.exception("the scheduler's thread has ended")
            with self._changed:
                self._error = error
        ended = self._ended()
        self._turns.fail_all(ended)
        for job in self._queue:
            job.fail(ended)
        self._after_events()
        if self._error is not None and self._others is not None:
            self._others.fail(self._error)

    def _generate(self) -> None:
        turns = self._turns
        while True:
            with self._changed:
                if not turns.busy:
                    turns.rest()
                    self._changed.wait_for(lambda: self._closing or self._queue)
                if self._closing:
                    return
                job = turns.next_of(self._queue)
                coming = 0 if self._queue else self._coming  # there is no room for more
                if job is None and (seconds := turns.pause(coming)):
                    self._changed.wait(seconds)
                    continue
            if job is not None:
                turns.begin(job)
            else:
                turns.turn(coming)
