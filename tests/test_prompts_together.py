"""Prompts are taken together with those from kept caches, and with those that are on their way."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from served import served
from test_company import alone, answered, at_once, settled
from test_scheduler import CODE, Listener

from glm_fused import Engine, EngineOptions
from glm_fused.generation.batching import filling as filling_module
from glm_fused.generation.batching import groups
from glm_fused.generation.batching.filling import Filling
from glm_fused.generation.batching.requests import GenerationRequest
from glm_fused.generation.batching.scheduler import Scheduler
from glm_fused.generation.options import Options
from glm_fused.generation.prompt_cache.store import PromptStore
from glm_fused.serve import openai_completions
from glm_fused.serve.arrivals import Arrival

LONG = 100  # seconds, which no test takes unless what it waits for never comes


@pytest.fixture(scope="module", params=["off", 2], ids=lambda draft: f"draft={draft}")
def drafting(request):
    with Engine("demo", EngineOptions(draft=request.param)) as engine:
        yield engine


def turns_of(engine):
    """A text, and others of which some begin with it; each has some 40 tokens that are not its."""
    first = engine.encode(CODE * 2, raw=True)
    new = engine.encode("\n\ndef write(path, text):\n" + CODE, raw=True)
    others = [
        [*first, *new],
        [*first[:20], 7, *new, 8],  # begins with some of it
        [9, *new],  # with nothing of it
        [*first, *new[:-2]],  # has fewer tokens left, so more of it is taken than needed
        [first[0], 9, *new[:-3]],
    ]
    options = [Options(12), Options(12, temp=0.9, seed=3), Options(9), Options(12), Options(15)]
    asked = [GenerationRequest(*each) for each in zip(others, options, strict=True)]
    return GenerationRequest(first, Options(1)), asked, len(new)


def with_a_store(engine, first, asked):
    """The events of requests that come at once, after ``first``, of which a store keeps a cache."""
    with PromptStore(engine.model, 64 << 20, block_tokens=16) as store:
        scheduler, listeners = Scheduler(engine, store=store), [Listener() for _ in asked]
        try:
            answered(scheduler, [first])
            settled(scheduler)
            at_once(scheduler, asked, listeners)
            for listener in listeners:
                listener.wait()
            settled(scheduler)
            described = scheduler.describe()
        finally:
            scheduler.close()
    assert described["memory"]["caches"] == 0
    return [listener.events for listener in listeners], described


def test_those_from_kept_caches_are_taken_with_others(drafting, taken):
    first, asked, new = turns_of(drafting)
    expected = alone(drafting, asked)
    taken.clear()
    events, described = with_a_store(drafting, first, asked)
    assert taken == [(1, len(first.tokens) - 1), (len(asked), new + 1)]
    kept = [len(request.tokens) - 1 - (new + 1) for request in asked]
    cached = [max(0, count) for count in kept]
    assert cached[0] == len(first.tokens) - 2 and min(kept) < 0
    assert [each[0].cached for each in events] == cached
    assert described["cached_tokens"] == sum(cached)
    found = [[event for event in each if hasattr(event, "token")] for each in events]
    assert found == expected


@pytest.mark.parametrize("fault", ["columns", "padding"])
def test_planted_faults_are_found(drafting, monkeypatch, fault):
    first, asked, _ = turns_of(drafting)
    expected = alone(drafting, asked)
    beside = filling_module.side_by_side

    def wrong(layers, padding):
        if fault == "padding":
            return beside(layers, [max(0, columns - 1) for columns in padding])
        for layer in layers:  # a row of another place
            for entry in layer.caches:
                entry.keys = None if entry.keys is None else mx.roll(entry.keys, 1, axis=2)
        return beside(layers, padding)

    monkeypatch.setattr(filling_module, "side_by_side", wrong)
    events, _ = with_a_store(drafting, first, asked)
    found = [[event for event in each if hasattr(event, "token")] for each in events]
    assert found != expected


def codes(engine, count):
    """Requests of similar lengths."""
    return [
        GenerationRequest(engine.encode("x" * (20 + i), raw=True), Options(5)) for i in range(count)
    ]


def submit(scheduler, request):
    listener = Listener()
    scheduler.submit(request, listener)
    return listener


def test_prompts_wait_for_requests_on_their_way(engine, monkeypatch, taken):
    monkeypatch.setattr(groups, "PATIENCE", LONG)
    asked, scheduler = codes(engine, 3), Scheduler(engine)
    scheduler.expect(3)
    listeners = []
    for request in asked:
        listeners.append(submit(scheduler, request))
        assert not taken
        scheduler.expect(-1)
    found = [listener.wait().generated for listener in listeners]
    assert [count for count, _ in taken] == [3]
    taken.clear()
    (lone,) = answered(scheduler, asked[:1])  # which waits for nobody
    assert [count for count, _ in taken] == [1]
    assert [*found, lone] == alone(engine, [*asked, asked[0]])
    scheduler.close()


def test_one_that_was_expected_and_does_not_come_keeps_nobody(engine, monkeypatch, taken):
    scheduler = Scheduler(engine)
    scheduler.expect(2)
    submit(scheduler, codes(engine, 1)[0]).wait()  # after its patience
    monkeypatch.setattr(groups, "PATIENCE", LONG)
    listener = submit(scheduler, codes(engine, 1)[0])
    scheduler.expect(-1)
    assert len(taken) == 1
    scheduler.expect(-1)  # it was given up
    listener.wait()
    scheduler.close()


def test_texts_are_decoded_while_prompts_wait_for_others(engine, monkeypatch, taken):
    """They get on by many tokens, and no prompt is taken."""
    monkeypatch.setattr(groups, "PATIENCE", LONG)
    scheduler, begun, on = Scheduler(engine), threading.Event(), threading.Event()
    talking = Listener(lambda event: begun.set() if hasattr(event, "token") else None)
    ticket = scheduler.submit(GenerationRequest([5], Options(4000)), talking)
    assert begun.wait(60)
    scheduler.expect(2)
    asked = codes(engine, 2)
    first, size = submit(scheduler, asked[0]), len(talking.events)
    talking._on_event = lambda event: on.set() if len(talking.events) > size + 40 else None
    scheduler.expect(-1)
    assert on.wait(60)
    assert not taken
    second = submit(scheduler, asked[1])
    scheduler.expect(-1)
    assert [each.wait().generated for each in (first, second)] == alone(engine, asked)
    assert taken[0][0] == 2
    ticket.cancel()
    scheduler.close()


def test_nobody_waits_for_those_that_have_no_room(engine, monkeypatch, taken):
    monkeypatch.setattr(groups, "PATIENCE", LONG)
    scheduler = Scheduler(engine, max_batch=1)
    scheduler.expect(2)
    for listener in [submit(scheduler, request) for request in codes(engine, 2)]:
        listener.wait()
    assert [count for count, _ in taken] == [1, 1]
    scheduler.close()


CLIENTS = 4  # as many as there are threads that make prompts


@pytest.mark.parametrize("patient", [True, False])
def test_prompts_of_several_clients_are_one_chunk(engine, monkeypatch, taken, patient):
    """Those after the first are not ready before its text has begun, unless it waits for them."""
    monkeypatch.setattr(groups, "PATIENCE", LONG if patient else 0.0)
    inside, make, ready = threading.Barrier(CLIENTS), openai_completions.encode, []
    begun, take = threading.Event(), Filling.take

    def encode(*given, **options):
        inside.wait(60)
        ready.append(1)
        if len(ready) > 1 and not patient:
            assert begun.wait(60)
        return make(*given, **options)

    monkeypatch.setattr(openai_completions, "encode", encode)
    monkeypatch.setattr(Filling, "take", lambda self, n: (begun.set(), take(self, n))[1])

    def ask(server, i):
        body = {"model": "demo", "prompt": "x" * (20 + i), "max_tokens": 5, "temperature": 0}
        status, found = server.post("/v1/completions", body)
        assert status == 200
        return found["choices"][0]["text"]

    with served(engine) as server, ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda i: ask(server, i), range(CLIENTS)))
        assert server.service.scheduler._coming == 0
    count = [texts for texts, _ in taken]
    assert count == [CLIENTS] if patient else count[0] == 1
    for i, text in enumerate(found):
        assert text == engine.generate("x" * (20 + i), raw=True, max_tokens=5, temp=0).text


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 2}, 200),
        ("/v1/completions", {"model": "demo", "prompt": "x", "stream": True}, 200),
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404),
        ("/v1/completions", {"model": "demo"}, 400),
        ("/v1/chat/completions", {"model": "demo", "messages": "hi"}, 400),
        ("/v1/nothing", {}, 404),
    ],
)
def test_whatever_becomes_of_a_request_nobody_waits_for_it_then(
    server, monkeypatch, path, body, status
):
    begin, counts = Arrival.begin, []

    def note(self):
        begin(self)
        counts.append(server.service.scheduler._coming)

    monkeypatch.setattr(Arrival, "begin", note)
    assert server.post(path, body)[0] == status
    assert counts == ([1] if path != "/v1/nothing" else [])  # whose body nobody reads
    end = time.monotonic() + 30
    while server.service.scheduler._coming:
        assert time.monotonic() < end
        time.sleep(0.001)
