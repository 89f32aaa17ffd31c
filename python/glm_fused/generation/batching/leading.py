"""Several ranks that generate for the requests of one: what rank 0 does, the others do after it.

The ranks share a model, so all have to make the same calls of it. Rank 0 has the requests, and
tells the others before each turn what it decided by time or by its clients: which requests begin,
which texts are let go of, whether a chunk or a step is next; and within a step each token that a
constraint had a part in. All else follows from these: the tokens, where texts end, what a store
keeps. Nobody answers.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, cast

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ...models.decoder import Model
from ...ops.blocks import MAX_TOKENS
from ..drafts.options import DraftOptions
from ..options import Options
from .jobs import Job
from .keeping import Store
from .requests import Constraint, Event, GenerationRequest, OnEvent
from .turns import Turn, Turns

_END = "end"


class Others(Protocol):
    """The other ranks, for the one that has the requests."""

    def say(self, text: str) -> None:
        """Tell all of them a line of text, in order."""
        ...

    def fail(self, error: BaseException) -> None:
        """End all ranks, this one too, because of an error."""
        ...


class LeadingTurns(Turns):
    """The turns of rank 0, which tells the ``others`` of each.

    An error of the model's ends them, as the others may not have it. What a listener raises lets go
    of its text before the next turn.
    """

    def __init__(self, others: Others, *args: Any):
        super().__init__(*args)
        self._others = others

    def begin(self, job: Job) -> None:
        """Begin with a request, for which there is room; one without a seed gets one."""
        request, options = job.request, job.request.options
        if options.seed is None:
            options = replace(options, seed=secrets.randbits(64))
        constraint = request.constraint
        told = None if constraint is None else _Told(constraint, self._say)
        job.request = replace(request, options=options, constraint=told)
        before = len(self._jobs)
        super().begin(job)
        if len(self._jobs) > before:  # else it has failed already
            cached = self._unbegun.prompts[-1].cached
            self._say(_described(job.request) | {"cached": cached})

    def turn(self, coming: int) -> None:
        """A chunk of prompts or a step, of which the others are told before."""
        found = self._gone()
        gone = [i for i, row in enumerate(self._jobs) if row in found]
        self._drop(found)
        turn = self._next(coming)
        self._say(turn._asdict() | {"gone": gone})
        self._take(turn)

    def fail_all(self, error: Exception) -> None:
        """End all requests with an error, and the others with it."""
        with suppress(OSError):  # they may be the error
            self._others.say(_END)
        super().fail_all(error)

    def _teller(self, job: Job) -> OnEvent:
        def tell(event: Event) -> None:
            try:
                job.tell(event)
            except Exception as error:
                job.fail(error)

        return tell

    def _say(self, what: dict[str, Any]) -> None:
        self._others.say(json.dumps(what))

    def _check_survives(self, error: Exception) -> None:
        raise error


class FollowingTurns(Turns):
    """The turns of another rank, which ``hear`` tells of in their order."""

    def __init__(self, hear: Callable[[], str], *args: Any):
        super().__init__(*args)
        self._hear = hear

    def follow(self) -> None:
        """Do what rank 0 does, until it ends.

        Raises RuntimeError where this rank has kept other beginnings of prompts.
        """
        while (text := self._hear()) != _END:
            said = json.loads(text)
            if "tokens" in said:
                self._follow_begin(said)
            else:
                rows = list(self._jobs)
                self._drop({rows[i] for i in said.pop("gone")})
                self._take(Turn(**said))
                if not self.busy:
                    self.rest()

    def _follow_begin(self, said: dict[str, Any]) -> None:
        cached, options = said.pop("cached"), Options(**said.pop("options"))
        constraint = _Heard(self._hear, self._model) if said.pop("constraint") else None
        job = Job(GenerationRequest(options=options, constraint=constraint, **said), _nobody)
        self.begin(job)
        found = None if job.over else self._unbegun.prompts[-1].cached
        if found != cached:
            raise RuntimeError(
                f"[shard] a prompt of {len(said['tokens'])} tokens begins with {cached} that rank 0"
                f" has kept, and {'an error' if found is None else found} here."
            )

    def _check_survives(self, error: Exception) -> None:
        raise error


def follow(
    model: Model,
    tokenizer: TokenizerWrapper,
    drafts: DraftOptions | None,
    store: Store | None,
    hear: Callable[[], str],
) -> None:
    """Do with a model what rank 0's scheduler does, until it is closed.

    ``hear`` gives what it says of each turn; ``store`` has the limits of rank 0's.
    """
    turns = FollowingTurns(hear, model, tokenizer, drafts, MAX_TOKENS, store, lambda: None)
    with wired_limit(model, cast(list[mx.Stream], [generation_stream])):
        turns.follow()
        turns.fail_all(RuntimeError("[shard] rank 0 has ended."))


def _described(request: GenerationRequest) -> dict[str, Any]:
    return {
        "tokens": list(request.tokens),
        "options": request.options.describe(),
        "top_logprobs": request.top_logprobs,
        "scores_prompt": request.scores_prompt,
        "constraint": request.constraint is not None,
    }


def _nobody(event: Event) -> None:
    """Nobody listens to the texts of other ranks than 0."""


class _Told:
    """A constraint of rank 0's, of whose tokens the others are told."""

    def __init__(self, constraint: Constraint, say: Callable[[dict[str, Any]], None]):
        self._constraint, self._say = constraint, say

    def allowed(self) -> mx.array:
        try:
            return self._constraint.allowed()
        except Exception:
            self._say({"token": None})
            raise

    def accept(self, token: int) -> None:
        try:
            self._constraint.accept(token)
        except Exception:
            self._say({"token": None})
            raise
        self._say({"token": token})


class _Heard:
    """A constraint on another rank: to the token that rank 0 chose."""

    def __init__(self, hear: Callable[[], str], model: Model):
        self._hear, self._places = hear, mx.arange(model.args.vocab_size)

    def allowed(self) -> mx.array:
        """Raises ValueError where rank 0's raised anything."""
        token = json.loads(self._hear())["token"]
        if token is None:
            raise ValueError("[shard] the constraint allows nothing.")
        allowed: mx.array = self._places == token
        return allowed

    def accept(self, token: int) -> None:
        """It is the one."""
