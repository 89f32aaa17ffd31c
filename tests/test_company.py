"""Requests in company have the tokens and log-probabilities that each has alone, bit for bit."""

import random
import threading
import time

import mlx.core as mx
import pytest
from test_scheduler import CODE, Listener, Only

from glm_fused import Engine, EngineOptions
from glm_fused.generation.batching import batch as batch_module
from glm_fused.generation.batching import filling as filling_module
from glm_fused.generation.batching import turns
from glm_fused.generation.batching.batch import Batch
from glm_fused.generation.batching.filling import Filling
from glm_fused.generation.batching.groups import group
from glm_fused.generation.batching.requests import GenerationRequest, PromptProgress
from glm_fused.generation.batching.scheduler import Scheduler
from glm_fused.generation.choice import Keys
from glm_fused.generation.options import Options
from glm_fused.generation.prompt_cache.store import PromptStore

TEXTS = [CODE, "def add(a, b):\n    return", CODE * 3, "class Tree:", "x", CODE * 9, "for i in "]
HOW = [
    {},
    {"temp": 0.9, "min_p": 0.02},
    {"temp": 1.3, "top_k": 30, "repetition_penalty": 1.2},
    {"repetition_penalty": 1.4, "stop": ("self",)},
]


@pytest.fixture(scope="module", params=["off", "auto", 2], ids=lambda draft: f"draft={draft}")
def engine(request):
    with Engine("demo", EngineOptions(draft=request.param, prefill_step_size=64)) as engine:
        yield engine


class Odd(Only):
    """Allows every other token, by the tokens so far."""

    def __init__(self, vocabulary):
        super().__init__([1], vocabulary)
        self._even = mx.arange(vocabulary) % 2 == 0
        mx.eval(self._even)  # in its own thread's stream

    def allowed(self):
        return self._even if len(self.accepted) % 2 else ~self._even


def requests(engine, count, seed):
    """Unlike requests; a constraint is one request's own, so each call makes new ones."""
    rng, found = random.Random(seed), []
    for i in range(count):
        options = Options(rng.randint(1, 40), seed=rng.randint(0, 99), **rng.choice(HOW))
        constraint = Odd(engine.model.args.vocab_size) if rng.random() < 0.25 else None
        tokens = engine.encode(rng.choice(TEXTS) + "y" * i, raw=True)
        top = rng.choice([None, 0, 3])
        found.append(GenerationRequest(tokens, options, top, constraint))
    return found


def answered(scheduler, requests, pause=lambda: None):
    listeners = [Listener() for _ in requests]
    for request, listener in zip(requests, listeners, strict=True):
        scheduler.submit(request, listener)
        pause()
    return [listener.wait().generated for listener in listeners]


def at_once(scheduler, requests, listeners):
    """Submit requests, of which the scheduler sees none before all are there."""
    with scheduler._changed:
        return [scheduler.submit(*each) for each in zip(requests, listeners, strict=True)]


def alone(engine, requests):
    scheduler = Scheduler(engine)
    try:
        return [answered(scheduler, [request])[0] for request in requests]
    finally:
        scheduler.close()


def check(engine, count, seed, pause=lambda: None):
    expected = alone(engine, requests(engine, count, seed))
    scheduler = Scheduler(engine)
    try:
        found = answered(scheduler, requests(engine, count, seed), pause)
    finally:
        scheduler.close()
    assert found == expected
    return found


MORE = [pytest.param(*each, marks=pytest.mark.slow) for each in ((16, 2), (23, 3), (40, 4))]


@pytest.mark.parametrize(("count", "seed"), [(9, 1), *MORE])
def test_each_has_what_it_has_alone(engine, count, seed):
    rng = random.Random(seed)
    found = check(engine, count, seed, lambda: time.sleep(rng.choice([0, 0.002, 0.02])))
    assert len({len(events) for events in found}) > 3


def test_alone_they_have_what_generate_gives(engine):
    for request in requests(engine, 12, 5):
        if request.constraint is None:
            (events,) = alone(engine, [request])
            expected = engine.generate(request.tokens, request.options)
            assert [event.token for event in events] == expected.tokens
            assert "".join(event.text for event in events) == expected.text
            assert events[-1].finish_reason == expected.finish_reason


def check_together(engine, count, seed):
    """As `check`, where what is taken and decoded together does not depend on the time."""
    expected = alone(engine, requests(engine, count, seed))
    scheduler, listeners = Scheduler(engine), [Listener() for _ in range(count)]
    try:
        at_once(scheduler, requests(engine, count, seed), listeners)
        assert [listener.wait().generated for listener in listeners] == expected
    finally:
        scheduler.close()


def test_together_each_has_what_it_has_alone(engine):
    check_together(engine, 9, 1)


def off_by_one(make):
    def wrong(*args):
        layer = make(*args)
        for entry in layer.caches:
            if hasattr(entry, "left_padding"):
                entry.left_padding = mx.maximum(entry.left_padding - 1, 0)
        return layer

    return wrong


@pytest.mark.parametrize("fault", ["joined", "padded", "key", "columns", "rows"])
def test_planted_faults_are_found(engine, monkeypatch, fault):
    if fault == "joined":
        monkeypatch.setattr(batch_module, "joined", off_by_one(batch_module.joined))
    elif fault == "padded":
        wrong = off_by_one(filling_module.side_by_side)
        monkeypatch.setattr(filling_module, "side_by_side", wrong)
    elif fault == "key":  # that of another text
        at, drawn = Keys.at, []
        monkeypatch.setattr(Keys, "at", lambda self, n: (drawn.append(n), at(self, len(drawn)))[1])
    elif fault == "columns":
        kept = batch_module.kept
        monkeypatch.setattr(batch_module, "kept", lambda layer, stay: kept(layer, stay[::-1]))
    else:  # each has the token of another
        monkeypatch.setattr(mx, "argmax", lambda x, axis, argmax=mx.argmax: argmax(x, axis)[::-1])
    with pytest.raises(AssertionError):
        check_together(engine, 9, 1)


class Sized:
    def __init__(self, left):
        self.left = left


@pytest.mark.parametrize(
    ("sizes", "most", "expected"),
    [
        ([40, 41, 39, 40], 2048, [40, 41, 39, 40]),
        ([40, 41, 39, 40], 130, [40, 41, 39]),  # the chunk is full
        ([40, 400, 45, 4, 43], 2048, [40, 45, 43]),  # the others would be padding mostly
        ([1, 1, 2, 1, 1], 2048, [1, 1, 1, 1]),
        ([3000, 3000], 2048, [3000]),
    ],
)
def test_prompts_of_similar_lengths_are_taken_together(sizes, most, expected):
    prompts = [Sized(size) for size in sizes]
    assert [prompt.left for prompt in group(prompts, most)] == expected


def test_prompts_that_wait_are_one_chunk(engine, taken):
    asked = [GenerationRequest(engine.encode("x" * n, raw=True), Options(9)) for n in range(8, 13)]
    expected = alone(engine, asked)
    sizes = [len(request.tokens) for request in asked]
    assert taken == [(1, size - 1) for size in sizes]
    taken.clear()
    scheduler, listeners = Scheduler(engine), [Listener() for _ in asked]
    at_once(scheduler, asked, listeners)
    assert [listener.wait().generated for listener in listeners] == expected
    assert taken == [(len(asked), max(sizes) - 1)]
    for listener, size in zip(listeners, sizes, strict=True):
        done = [event.done for event in listener.events if isinstance(event, PromptProgress)]
        assert done == [0, size - 1, size]
    scheduler.close()


def test_who_leaves_while_prompts_are_taken_together(engine, taken):
    """One is cancelled and the listener of one fails; the others have what they have alone."""
    asked = [GenerationRequest(engine.encode("x" * n, raw=True), Options(9)) for n in range(8, 13)]
    expected = alone(engine, asked)
    taken.clear()
    scheduler, listeners = Scheduler(engine), [Listener() for _ in asked]

    def fail(event):
        if event.done:
            raise KeyError("planted")

    listeners[1]._on_event = lambda event: tickets[1].cancel()
    listeners[3]._on_event = lambda event: fail(event) if hasattr(event, "done") else None
    tickets = at_once(scheduler, asked, listeners)
    for i in (0, 2, 4):
        assert listeners[i].wait().generated == expected[i]
    assert isinstance(listeners[3].wait().error, KeyError)
    settled(scheduler)
    assert len(taken) == 1 and taken[0][0] == len(asked)
    assert len(listeners[1].events) == 1 and not listeners[3].generated
    found = scheduler.describe()
    assert (found["finished"], found["cancelled"], found["failed"]) == (3, 1, 1)
    assert (found["filling"], found["memory"]["caches"]) == (0, 0)
    scheduler.close()


def test_a_chunk_that_fails_fails_those_in_it(engine, monkeypatch):
    asked = [GenerationRequest(engine.encode("x" * n, raw=True), Options(9)) for n in (9, 10)]
    scheduler, listeners = Scheduler(engine), [Listener() for _ in asked]

    def fail(self, most):
        raise RuntimeError("planted")

    monkeypatch.setattr(Filling, "take", fail)
    at_once(scheduler, asked, listeners)
    for listener in listeners:
        assert "planted" in str(listener.wait().error)
    monkeypatch.undo()
    assert answered(scheduler, asked) == alone(engine, asked)
    scheduler.close()


def test_prompts_have_more_time_where_they_are_more(engine, monkeypatch):
    """A text that is decoded alone beside four others' prompts makes no steps for each chunk."""
    monkeypatch.setattr(turns, "time", clock := Clock())
    take, step = Filling.take, Batch.step
    order = []

    def slow_chunk(self, most):
        order.append("chunk")
        clock.now += 12.0
        return take(self, most)

    def slow_step(self, *given):
        order.append("step")
        clock.now += 1.0
        return step(self, *given)

    monkeypatch.setattr(Filling, "take", slow_chunk)
    monkeypatch.setattr(Batch, "step", slow_step)
    talker = GenerationRequest(engine.encode("x", raw=True), Options(200))
    others = [GenerationRequest(engine.encode(CODE * n, raw=True), Options(1)) for n in (4, 5, 12)]
    scheduler, listeners = Scheduler(engine), [Listener() for _ in range(4)]
    at_once(scheduler, [talker, *others], listeners)
    for listener in listeners:
        listener.wait()
    scheduler.close()
    runs = "".join("c" if what == "chunk" else "s" for what in order).split("c")[1:]
    assert len(runs) > 6
    assert len(runs[0]) == 4  # a quarter of the time, as for each of the three that wait
    assert len(runs[-2]) == 12  # as much as the one that waits


class Clock:
    """Time that goes on when it is told to."""

    now = 0.0

    def perf_counter(self):
        return self.now


def test_a_long_prompt_does_not_keep_others_waiting(engine, monkeypatch):
    """Between any two of its chunks there is a step of those that are decoded."""
    monkeypatch.setattr(turns, "BESIDE", 32)
    order, take, step = [], Filling.take, Batch.step
    monkeypatch.setattr(Filling, "take", lambda self, n: (order.append("chunk"), take(self, n))[1])
    monkeypatch.setattr(Batch, "step", lambda self, *a: (order.append("step"), step(self, *a))[1])
    long = engine.encode(CODE * 12, raw=True)
    expected = alone(engine, [GenerationRequest(long, Options(5))])
    order.clear()
    scheduler, started = Scheduler(engine), threading.Event()
    talking = Listener(lambda event: started.set())
    ticket = scheduler.submit(
        GenerationRequest(engine.encode("x", raw=True), Options(4000)), talking
    )
    assert started.wait(60)
    listener = Listener()
    scheduler.submit(GenerationRequest(long, Options(5)), listener)
    listener.wait()
    ticket.cancel()
    scheduler.close()
    assert [listener.generated] == expected
    chunks = [i for i, what in enumerate(order) if what == "chunk"]
    assert len(chunks) > 6
    assert all(order[i + 1] == "step" for i in chunks)
    done = [event.done for event in listener.events if isinstance(event, PromptProgress)]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, len(long))


def test_short_prompts_do_not_wait_for_a_long_one(engine):
    scheduler, ended = Scheduler(engine), []
    listeners = [Listener() for _ in range(2)]
    texts = [CODE * 12, CODE]
    for i, (text, listener) in enumerate(zip(texts, listeners, strict=True)):
        listener._on_event = lambda event, i=i: ended.append(i)
        tokens = engine.encode(text, raw=True)
        scheduler.submit(GenerationRequest(tokens, Options(1)), listener)
    for listener in listeners:
        listener.wait()
    scheduler.close()
    assert ended[-1] == 0


def test_cancelled_requests_leave_and_memory_comes_back(engine):
    scheduler, base = Scheduler(engine), None
    rng = random.Random(4)
    for turn in range(5):
        listeners, tickets = [], []
        for request in requests(engine, 9, 1):
            listener = Listener()
            listeners.append(listener)
            tickets.append(scheduler.submit(request, listener))
            time.sleep(rng.choice([0, 0.003]))
        for ticket in tickets[::2]:
            ticket.cancel()
        counts = [len(listener.events) for listener in listeners[::2]]
        for listener in listeners[1::2]:
            listener.wait()
        assert counts == [len(listener.events) for listener in listeners[::2]]
        settled(scheduler)
        base = held(engine.model) if turn == 1 else base
    assert held(engine.model) < base + (1 << 20)
    found = scheduler.describe()
    assert (found["active"], found["filling"], found["queued"]) == (0, 0, 0)
    assert found["finished"] + found["cancelled"] == 5 * 9
    assert found["memory"]["caches"] == 0
    scheduler.close()


def held(model):
    """The bytes that MLX holds, without recorded steps, of which there are some for each shape."""
    for steps in (model._steps, model._drafts):
        steps._last = {}
        if steps._parts is not None:
            steps._parts.steps = {}
    return mx.get_active_memory()


def test_streamed_experts_keep_to_the_context_that_was_planned():
    with Engine("demo") as engine:
        prompts = [engine.encode(text, raw=True) for text in TEXTS[:5]]
        asked = [GenerationRequest(prompt, Options(8, temp=0.8, seed=2)) for prompt in prompts]
        expected = alone(engine, asked)
    with Engine("demo", EngineOptions(slots=4, context=120, draft=2)) as streamed:
        scheduler = Scheduler(streamed)
        assert scheduler._turns._capacity.columns == 120
        assert answered(scheduler, asked) == expected
        scheduler.close()


def test_an_error_in_a_step_fails_who_is_in_it(engine, monkeypatch):
    """The thread goes on, and so do prompts that are being taken."""
    scheduler, step, failed = Scheduler(engine), Batch.step, []

    def fail_once(self, *given):
        if len(self.rows) > 1 and not failed:
            failed.extend(self.rows)
            raise RuntimeError("planted")
        return step(self, *given)

    monkeypatch.setattr(Batch, "step", fail_once)
    asked = [GenerationRequest(engine.encode("x" * n, raw=True), Options(50)) for n in (1, 2)]
    listeners = [Listener() for _ in asked]
    for request, listener in zip(asked, listeners, strict=True):
        scheduler.submit(request, listener)
    for listener in listeners:
        assert "planted" in str(listener.wait().error)
    monkeypatch.undo()
    assert len(failed) == 2
    assert answered(scheduler, asked) == alone(engine, asked)
    settled(scheduler)
    assert scheduler.describe()["failed"] == 2
    scheduler.close()


def settled(scheduler):
    """Wait until the scheduler has nothing to do."""
    for _ in range(1000):
        found = scheduler.describe()
        if not found["active"] + found["queued"]:
            return
        time.sleep(0.01)
    raise AssertionError(found)


def test_a_second_turn_takes_only_what_is_new(engine):
    """Its text is what it has alone, with drafts too; nothing of another text is taken for it."""
    first = GenerationRequest(engine.encode(CODE * 3, raw=True), Options(20))
    (said,) = alone(engine, [first])
    text = [*first.tokens, *(event.token for event in said)]
    others = [*text, *engine.encode("\n\ndef write(", raw=True)], [*text[:40], 7, *text[40:]]
    turns = [GenerationRequest(tokens, Options(20, temp=0.7, seed=3)) for tokens in others]
    expected = alone(engine, turns)
    with PromptStore(engine.model, 64 << 20, block_tokens=16) as store:
        scheduler = Scheduler(engine, store=store)
        assert answered(scheduler, [first]) == [said]
        settled(scheduler)
        listeners = [Listener() for _ in turns]
        for request, listener in zip(turns, listeners, strict=True):
            scheduler.submit(request, listener)
        assert [listener.wait().generated for listener in listeners] == expected
        scheduler.close()
    starts = [listener.events[0] for listener in listeners]
    assert [start.cached for start in starts] == [len(text) - 1, 40]
    assert all(start.done == start.cached for start in starts)
    assert scheduler.describe()["cached_tokens"] == len(text) - 1 + 40
    assert scheduler.describe()["not_stored"] == 0
