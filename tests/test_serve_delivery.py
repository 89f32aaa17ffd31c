"""Events reach clients together, and whole; where nothing is generated, clients hear so."""

import asyncio
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from served import served
from test_scheduler import Listener

from glm_fused.generation.batching.requests import GeneratedToken, GenerationRequest
from glm_fused.generation.batching.scheduler import Scheduler, SchedulerEnded
from glm_fused.generation.batching.turns import Turns
from glm_fused.generation.options import Options
from glm_fused.serve import delivery
from glm_fused.serve.delivery import Delivery
from glm_fused.serve.streams import Template, data

USER = [{"role": "user", "content": "def f(x):\n"}]
ASKED = {
    "/v1/chat/completions": {"messages": USER, "max_tokens": 400},
    "/v1/completions": {"prompt": "def f(x):\n", "max_tokens": 400},
    "/v1/messages": {"messages": USER, "max_tokens": 400},
    "/v1/responses": {"input": "def f(x):\n", "max_output_tokens": 400},
}


class Loop(asyncio.SelectorEventLoop):
    """Counts how often other threads wake it."""

    woken = 0

    def call_soon_threadsafe(self, *args, **options):
        self.woken += 1
        return super().call_soon_threadsafe(*args, **options)


def events_of(engine, flushed, step):
    """What four texts told a loop, and how often the scheduler woke it for that.

    Each turn of the scheduler seems to take ``step`` seconds.
    """
    turns = itertools.count()
    handing, found = Delivery(lambda: step * next(turns)), [[] for _ in range(4)]
    loop = Loop()

    async def main():
        ended = asyncio.Event()

        def listener(i):
            def receive(events):
                found[i].extend(events)
                if all(each and getattr(each[-1], "finish_reason", None) for each in found):
                    ended.set()

            return handing.to(receive)

        scheduler = Scheduler(engine, after_events=flushed(handing))
        tokens = engine.encode("def f(x):\n", raw=True)
        with scheduler._changed:
            for i in range(4):
                asked = GenerationRequest(tokens, Options(20 + i, temp=1.0, seed=i))
                scheduler.submit(asked, flushing(handing, listener(i), flushed))
        await asyncio.wait_for(ended.wait(), 100)
        loop.woken, woken = 0, loop.woken
        scheduler.close()
        return woken

    try:
        return found, loop.run_until_complete(main())
    finally:
        loop.close()


def flushing(handing, tell, flushed):
    """A listener; where a fault is planted, each event is handed over by itself."""

    def at_once(event):
        tell(event)
        handing.flush()

    return at_once if flushed is nobody else tell


def nobody(handing):
    return lambda: None


def test_a_slow_step_wakes_the_loop_once_and_quick_ones_together(engine):
    """For the events of all texts."""
    found, woken = events_of(engine, lambda handing: handing.flush, step=1)
    tokens = [sum(isinstance(e, GeneratedToken) for e in events) for events in found]
    assert tokens == [20, 21, 22, 23]
    assert 23 <= woken <= 23 + 8  # a step each, and what prompts tell
    planted, often = events_of(engine, nobody, step=1)
    assert planted == found
    assert often > 2 * woken
    quick, seldom = events_of(engine, lambda handing: handing.flush, step=0.002)
    assert quick == found
    assert seldom <= 12 + 3  # prompts, first tokens, four ends, and twenty steps in nines


@pytest.mark.parametrize("text", ["x", "", '"', "\\", "\n\u2028\x00", "é😀", "\ud800", "</s>"])
def test_a_template_makes_the_event_of_the_whole_document(text):
    def document(text):
        return {"id": "a", "choices": [{"text": text, "index": 0}], "usage": None}

    assert Template(document)(text) == data(document(text))


@pytest.mark.parametrize("together", [0, 60])  # of which the first is the control
def test_what_is_handed_over_together_is_sent_together(server, monkeypatch, together):
    """In each API: the text of the tokens between the first and the last is one event's."""
    monkeypatch.setattr(delivery, "TOGETHER", together)
    for path, asked in ASKED.items():
        body = {"model": "demo", "stream": True} | asked
        body |= {name: 30 for name in body if name.startswith("max_")}
        pieces = pieces_of(server, path, body)
        assert len(pieces) <= 3 if together else len(pieces) > 5, path
        whole = server.post(path, body | {"stream": False})[1]
        assert "".join(pieces) == WHOLE[path](whole)


WHOLE = {
    "/v1/chat/completions": lambda answer: answer["choices"][0]["message"]["content"],
    "/v1/completions": lambda answer: answer["choices"][0]["text"],
    "/v1/messages": lambda answer: answer["content"][0]["text"],
    "/v1/responses": lambda answer: answer["output"][0]["content"][0]["text"],
}


def chunks_of(server, path, body):
    """The documents of a stream."""
    lines = server.post(path, body)[1].decode().splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def pieces_of(server, path, body):
    """The texts of a stream's events that have any."""
    if path in ("/v1/messages", "/v1/responses"):
        found = [chunk.get("delta", "") for chunk in chunks_of(server, path, body)]
        texts = [one if isinstance(one, str) else one.get("text", "") for one in found]
    else:
        found = [choice for chunk in chunks_of(server, path, body) for choice in chunk["choices"]]
        texts = [one["delta"].get("content") if "delta" in one else one["text"] for one in found]
    return [text for text in texts if text]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_tokens_with_log_probabilities_are_not_joined(server, monkeypatch, path):
    monkeypatch.setattr(delivery, "TOGETHER", 60)
    listed = {
        "/v1/chat/completions": {"logprobs": True, "top_logprobs": 2},
        "/v1/completions": {"logprobs": 2},
        "/v1/responses": {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    }
    body = {"model": "demo", "stream": True} | ASKED[path] | listed[path]
    body |= {name: 30 for name in body if name.startswith("max_")}
    pieces = pieces_of(server, path, body)
    assert len(pieces) > 15
    assert "".join(pieces) == WHOLE[path](server.post(path, body | {"stream": False})[1])


def test_streamed_chunks_are_of_the_published_types(server):
    kinds = {"/v1/chat/completions": ChatCompletionChunk, "/v1/completions": Completion}
    for path, kind in kinds.items():
        body = {"model": "demo", "stream": True} | ASKED[path] | {"max_tokens": 600, "n": 2}
        for options in ({}, {"stream_options": {"include_usage": True}}):
            chunks = chunks_of(server, path, body | options)
            assert len(chunks) > 20
            for chunk in chunks:
                kind.model_validate(published(chunk), strict=True)
            whole = server.post(path, body | {"stream": False})[1]
            for choice in whole["choices"]:
                found = [one for c in chunks for one in c["choices"]]
                own = [one for one in found if one["index"] == choice["index"]]
                pieces = [one["delta"].get("content") or "" for one in own if "delta" in one]
                text = "".join(pieces or [one["text"] for one in own])
                assert text == (choice.get("text") or choice["message"]["content"])


def published(chunk):
    """OpenAI's type of completions has no room for the null of a text that goes on."""
    if chunk["object"] != "text_completion":
        return chunk
    choices = [{**one, "finish_reason": one["finish_reason"] or "stop"} for one in chunk["choices"]]
    return chunk | {"choices": choices}


def plant_death(monkeypatch, after):
    """Have an error end the scheduler's thread after so many of its turns."""
    turn, turns = Turns.turn, []

    def dying(self, coming):
        turns.append(1)
        if len(turns) > after:
            raise KeyError("planted")
        turn(self, coming)

    monkeypatch.setattr(Turns, "turn", dying)


def test_a_dead_scheduler_fails_all(engine, monkeypatch):
    plant_death(monkeypatch, 5)
    scheduler, listeners = Scheduler(engine, max_batch=1), [Listener() for _ in range(3)]
    tokens = engine.encode("def f(x):\n", raw=True)
    with scheduler._changed:
        assert scheduler.alive
        for listener in listeners:
            scheduler.submit(GenerationRequest(tokens, Options(50)), listener)
    for listener in listeners:
        assert isinstance(listener.wait().error, SchedulerEnded)
    assert listeners[0].generated and not listeners[1].generated
    assert not scheduler.alive
    with pytest.raises(SchedulerEnded, match="an error has ended it"):
        scheduler.submit(GenerationRequest(tokens, Options(50)), Listener())
    found = scheduler.describe()
    assert (found["active"], found["filling"]) == (0, 0)
    scheduler.close()


def test_a_server_that_cannot_generate_says_so(engine, monkeypatch):
    """Requests that run or come later get an error at once, each in its API's shape."""
    with served(engine) as server:
        assert server.get("/health")[0] == 200
        plant_death(monkeypatch, 12)
        begun = threading.Barrier(len(ASKED))

        def ask(path):
            begun.wait()
            return server.post(path, {"model": "demo", "stream": True} | ASKED[path])

        with ThreadPoolExecutor(len(ASKED)) as pool:
            running = dict(zip(ASKED, pool.map(ask, ASKED), strict=True))
        status, found = server.get("/health")
        assert (status, found["status"]) == (503, "failed")
        for path, asked in ASKED.items():
            status, said = running[path]
            if status == 200:  # it had begun
                assert "does not generate any more" in said.decode()
            else:
                assert status == 503
            for stream in (False, True):
                status, said = server.post(path, {"model": "demo", "stream": stream} | asked)
                assert status == 503
                assert "does not generate any more" in said["error"]["message"]
            assert said.get("type") == ("error" if path == "/v1/messages" else None)
        assert any(status == 200 for status, _ in running.values())
