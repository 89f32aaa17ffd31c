"""The numbers of the live page: what runs, tokens a second, memory by kind, experts."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="needs glm-fused[serve]")
from glm_fused import Engine, EngineOptions
from glm_fused.generation.batching.requests import (
    Failure,
    GeneratedToken,
    GenerationRequest,
    PromptProgress,
)
from glm_fused.generation.options import Options
from glm_fused.serve.activity import SECONDS, Activity
from glm_fused.serve.stats import Stats


class Scheduler:
    """Takes requests, and lets a test say what becomes of them."""

    def __init__(self):
        self.now, self.tell, self.cancelled, self.refuses = 1000.0, [], [], False
        self.activity = Activity(self.submit, lambda: self.now)

    def submit(self, request, receive):
        if self.refuses:
            raise ValueError("[scheduler] refused.")
        self.tell.append(receive)
        number = len(self.tell) - 1
        return SimpleNamespace(cancel=lambda: self.cancelled.append(number))

    def ask(self, tokens: int):
        """A ticket, and the events that whoever asked has got."""
        got = []
        request = GenerationRequest(list(range(tokens)), Options())
        return self.activity.submit(request, got.extend), got


@pytest.fixture
def scheduler():
    return Scheduler()


def token(reason=None):
    return GeneratedToken(5, "x", reason)


def rows(scheduler):
    found = scheduler.activity.describe()["active"]
    names = ("phase", "prompt_done", "prompt_total", "cached", "tokens")
    return [tuple(row[name] for name in names) for row in found]


def test_a_request_is_followed_from_its_prompt_to_its_end(scheduler):
    _, got = scheduler.ask(70)
    assert rows(scheduler) == []  # it waits
    tell = scheduler.tell[0]
    events = [PromptProgress(16, 70, 16), PromptProgress(60, 70, 16)]
    tell(events)
    assert rows(scheduler) == [("prompt", 60, 70, 16, 0)]
    tell([token(), token()])
    assert rows(scheduler) == [("generation", 70, 70, 16, 2)]
    scheduler.ask(3)
    scheduler.tell[1]([PromptProgress(0, 3, 0)])
    assert len(rows(scheduler)) == 2
    tell([token("stop")])
    assert rows(scheduler) == [("prompt", 0, 3, 0, 0)]
    assert [type(event) for event in got] == [PromptProgress] * 2 + [GeneratedToken] * 3
    totals = scheduler.activity.describe()["totals"]
    assert totals == {"requests": 1, "prompt": 70, "cached": 16, "generated": 3}


@pytest.mark.parametrize("how", ["cancel", "fail", "refuse"])
def test_what_ends_early_is_forgotten(scheduler, how):
    scheduler.refuses = how == "refuse"
    if how == "refuse":
        with pytest.raises(ValueError, match="refused"):
            scheduler.ask(4)
        return
    ticket, got = scheduler.ask(4)
    scheduler.tell[0]([token()])
    assert len(rows(scheduler)) == 1
    if how == "cancel":
        ticket.cancel()
        assert scheduler.cancelled == [0]
    else:
        scheduler.tell[0]([Failure(RuntimeError("no"))])
        assert isinstance(got[-1], Failure)
    assert rows(scheduler) == []


def test_the_history_has_every_token_in_its_second(scheduler):
    """Tokens at random times of the last four minutes, beside a plain count of them."""
    draw = random.Random(seed := random.randrange(2**32))
    scheduler.ask(1)
    begin, times = scheduler.now, sorted(draw.uniform(0, 240) for _ in range(3000))
    for at in times:
        scheduler.now = begin + at
        scheduler.tell[0]([token()] * 2)
    scheduler.now = begin + 240 + draw.choice([0.0, 0.25, 0.5])
    found = scheduler.activity.describe()["history"]
    end = scheduler.now
    expected = [
        sum(end - ago - 1 <= begin + at < end - ago for at in times) for ago in range(SECONDS)
    ][::-1]
    assert found == [2 * count for count in expected] and sum(found) > 2000, seed


@pytest.mark.parametrize(("gap", "companions"), [(0.05, 1), (0.01, 3), (0.5, 2), (3.0, 1)])
def test_the_rate_is_that_of_the_last_seconds(scheduler, gap, companions):
    for _ in range(companions):
        scheduler.ask(2)
    for i in range(400):
        scheduler.now = 1000 + i * gap
        for tell in scheduler.tell:
            tell([token()])
    found = scheduler.activity.describe()
    assert found["tokens_per_second"] == pytest.approx(companions / gap, rel=0.3, abs=0.5)
    assert found["active"][0]["tokens_per_second"] == pytest.approx(1 / gap, rel=0.3, abs=0.5)
    scheduler.now += 10
    assert scheduler.activity.describe()["tokens_per_second"] == 0


@pytest.mark.parametrize("options", [EngineOptions(), EngineOptions(slots=4, context=300)])
def test_memory_and_experts_are_the_engines(scheduler, options):
    numbers = {"queued": 3, "memory": {"caches": 777, "store": 1234}}
    scheduler.describe = lambda: numbers
    settings = SimpleNamespace(name="demo", max_batch=16)
    with Engine("demo", options) as engine:
        engine.generate("def main():", max_tokens=12)
        stats = Stats(
            SimpleNamespace(
                engine=engine,
                scheduler=scheduler,
                activity=scheduler.activity,
                settings=settings,
                started=0,
            )
        )
        idle = stats.describe()
        memory = idle["memory"]
        assert memory["weights"] + memory["slots"] == engine.model.weight_bytes
        assert (memory["kv"], memory["prompt_cache"], idle["queued"]) == (777, 1234, 3)
        assert memory["other"] > 10_000_000 and min(memory.values()) >= 0
        if options.slots is None:
            assert idle["experts"] is None and memory["slots"] == 0
            return
        experts, totals = idle["experts"], engine.streaming.stats()
        assert experts["slots"] == 4 and memory["slots"] == engine.streaming.plan.slot_bytes
        assert sum(layer["hits"] for layer in experts["layers"]) == totals["hits"] > 0
        assert sum(layer["reads"] for layer in experts["layers"]) == totals["misses"] > 0
        for layer in experts["layers"]:
            used = layer["hits"] + layer["reads"]
            assert layer["hit_rate"] == layer["hits"] / used
