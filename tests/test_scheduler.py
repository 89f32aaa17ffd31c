"""Requests that are generated for at the same time have the tokens that each has alone."""

import threading

import mlx.core as mx
import pytest

from glm_fused.generation.batching.requests import (
    Failure,
    GeneratedToken,
    GenerationRequest,
    PromptProgress,
)
from glm_fused.generation.batching.scheduler import QueueFull, Scheduler
from glm_fused.generation.options import Options

CODE = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"


@pytest.fixture
def scheduler(engine):
    scheduler = Scheduler(engine, max_queue=4)
    yield scheduler
    scheduler.close()


class Listener:
    """Collects the events of a request, and knows when it is over."""

    def __init__(self, on_event=lambda event: None):
        self.events, self._over, self._on_event = [], threading.Event(), on_event

    def __call__(self, event):
        self.events.append(event)
        self._on_event(event)
        if isinstance(event, Failure) or getattr(event, "finish_reason", None):
            self._over.set()

    def wait(self):
        assert self._over.wait(200), "the request did not end"
        return self

    @property
    def generated(self):
        return [event for event in self.events if isinstance(event, GeneratedToken)]

    @property
    def tokens(self):
        return [event.token for event in self.generated]

    @property
    def text(self):
        return "".join(event.text for event in self.generated)

    @property
    def error(self):
        return self.events[-1].error


def request(engine, text, max_tokens=12, **options):
    return GenerationRequest(engine.encode(text, raw=True), Options(max_tokens, **options))


def test_a_request_has_the_text_of_generate(engine, scheduler):
    expected = engine.generate(CODE, raw=True, max_tokens=12)
    listener = Listener()
    scheduler.submit(request(engine, CODE), listener)
    listener.wait()
    assert (listener.tokens, listener.text) == (expected.tokens, expected.text)
    assert [e.finish_reason for e in listener.generated] == [None] * 11 + ["length"]
    progress = [event for event in listener.events if isinstance(event, PromptProgress)]
    assert progress == listener.events[: len(progress)]
    size = len(engine.encode(CODE, raw=True))
    assert (progress[0], progress[-1]) == (
        PromptProgress(0, size, 0),
        PromptProgress(size, size, 0),
    )


def test_log_probabilities_are_those_of_the_models_logits(engine, scheduler):
    listener = Listener()
    asked = request(engine, CODE)
    scheduler.submit(GenerationRequest(asked.tokens, asked.options, top_logprobs=3), listener)
    listener.wait()
    logits = engine.step(mx.array([[*asked.tokens, *listener.tokens]]))[0].astype(mx.float32)
    for i, event in enumerate(listener.generated, len(asked.tokens) - 1):
        expected = logits[i] - mx.logsumexp(logits[i])
        values = expected.tolist()
        best = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:3]
        assert [token for token, _ in event.top] == best
        assert [value for _, value in event.top] == [expected[token].item() for token in best]
        assert event.logprob == expected[event.token].item()


class Only:
    """Allows a few tokens, and notes what it is told."""

    def __init__(self, tokens, vocabulary):
        self._mask = mx.zeros((vocabulary,), mx.bool_)
        self._mask[mx.array(tokens)] = True
        mx.eval(self._mask)  # in its own thread's stream
        self.accepted = []

    def allowed(self):
        return self._mask

    def accept(self, token):
        self.accepted.append(token)


def test_a_constraint_is_kept_to(engine, scheduler):
    asked, listener = request(engine, CODE), Listener()
    constraint = Only([5, 9, 200], engine.model.args.vocab_size)
    scheduler.submit(
        GenerationRequest(asked.tokens, asked.options, constraint=constraint), listener
    )
    listener.wait()
    assert set(listener.tokens) <= {5, 9, 200}
    assert constraint.accepted == listener.tokens


def test_cancelling(engine, scheduler):
    listener, seen = Listener(), threading.Event()

    def cancel(event):
        if len(listener.generated) == 3:
            ticket.cancel()
            seen.set()

    listener._on_event = cancel
    ticket = scheduler.submit(request(engine, CODE, 200), listener)
    assert seen.wait(60)
    after = Listener()
    scheduler.submit(request(engine, CODE), after)
    after.wait()
    assert len(listener.generated) == 3


def test_a_queue_that_is_full(engine, scheduler):
    held, release = threading.Event(), threading.Event()

    def hold(event):
        held.set()
        release.wait(60)

    listeners = [Listener(hold), *(Listener() for _ in range(4))]
    scheduler.submit(request(engine, CODE), listeners[0])
    assert held.wait(60)
    for listener in listeners[1:]:
        scheduler.submit(request(engine, CODE), listener)
    with pytest.raises(QueueFull, match="4 requests are waiting"):
        scheduler.submit(request(engine, CODE), Listener())
    assert scheduler.describe()["queued"] == 4
    release.set()
    for listener in listeners:
        assert listener.wait().tokens == listeners[0].tokens


def test_what_does_not_fit_is_refused(engine, scheduler):
    with pytest.raises(ValueError, match="exceed the context"):
        scheduler.submit(request(engine, CODE, engine.context), Listener())
    with pytest.raises(ValueError, match="expected 1 to"):
        scheduler.submit(GenerationRequest([], Options()), Listener())


def test_a_listener_that_fails_ends_its_request_alone(engine, scheduler):
    def fail(event):
        if isinstance(event, GeneratedToken):
            raise KeyError("planted")

    failing, other = Listener(fail), Listener()
    scheduler.submit(request(engine, CODE), failing)
    scheduler.submit(request(engine, CODE), other)
    assert len(other.wait().tokens) == 12
    assert isinstance(failing.error, KeyError)
    assert len(failing.generated) == 1


def test_closing_fails_what_is_left(engine):
    scheduler, listeners = Scheduler(engine), [Listener(), Listener()]
    for listener in listeners:
        scheduler.submit(request(engine, CODE, 1000), listener)
    scheduler.close()
    scheduler.close()
    for listener in listeners:
        assert isinstance(listener.wait().error, RuntimeError)
    with pytest.raises(RuntimeError, match="closed"):
        scheduler.submit(request(engine, CODE), Listener())
