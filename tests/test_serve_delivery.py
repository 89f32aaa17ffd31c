"""Events reach clients together, and whole; where nothing is generated, clients hear so."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from served import served
from test_scheduler import Listener

from glm_fused.generation.batching.jobs import Job
from glm_fused.generation.batching.requests import GeneratedToken, GenerationRequest
from glm_fused.generation.batching.scheduler import Scheduler, SchedulerEnded
from glm_fused.generation.batching.turns import Turns
from glm_fused.generation.options import Options
from glm_fused.serve.delivery import Delivery
from glm_fused.serve.metrics import Metrics
from glm_fused.serve.running import Running
from glm_fused.serve.streams import MOST_AT_ONCE, EventStream, Template, data

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


def events_of(engine, flushed):
    """What four texts told a loop, and how often the scheduler woke it for that."""
    delivery, found = Delivery(), [[] for _ in range(4)]
    loop = Loop()

    async def main():
        ended = asyncio.Event()

        def listener(i):
            def receive(event):
                found[i].append(event)
                if all(each and getattr(each[-1], "finish_reason", None) for each in found):
                    ended.set()

            return delivery.to(receive)

        scheduler = Scheduler(engine, after_events=flushed(delivery))
        tokens = engine.encode("def f(x):\n", raw=True)
        with scheduler._changed:
            for i in range(4):
                asked = GenerationRequest(tokens, Options(20 + i, temp=1.0, seed=i))
                scheduler.submit(asked, flushing(delivery, listener(i), flushed))
        await asyncio.wait_for(ended.wait(), 100)
        loop.woken, woken = 0, loop.woken
        scheduler.close()
        return woken

    try:
        return found, loop.run_until_complete(main())
    finally:
        loop.close()


def flushing(delivery, tell, flushed):
    """A listener; where a fault is planted, each event is handed over by itself."""

    def at_once(event):
        tell(event)
        delivery.flush()

    return at_once if flushed is nobody else tell


def nobody(delivery):
    return lambda: None


def test_a_step_wakes_the_loop_once(engine):
    """For the events of all its texts."""
    found, woken = events_of(engine, lambda delivery: delivery.flush)
    tokens = [sum(isinstance(e, GeneratedToken) for e in events) for events in found]
    assert tokens == [20, 21, 22, 23]
    assert woken <= 23 + 8  # a step each, and what prompts tell
    planted, often = events_of(engine, nobody)
    assert planted == found
    assert often > 2 * woken


def test_a_loop_that_was_closed_holds_nobody_up():
    delivery = Delivery()
    loops = [asyncio.new_event_loop() for _ in range(2)]

    async def to(receive):
        return delivery.to(receive)

    found = []
    puts = [loop.run_until_complete(to(found.append)) for loop in loops]
    loops[0].close()
    for put in puts:
        put("event")
    delivery.flush()
    loops[1].run_until_complete(asyncio.sleep(0))
    assert found == ["event"]
    loops[1].close()


@pytest.mark.parametrize("text", ["x", "", '"', "\\", "\n\u2028\x00", "é😀", "\ud800", "</s>"])
def test_a_template_makes_the_event_of_the_whole_document(text):
    def document(text):
        return {"id": "a", "choices": [{"text": text, "index": 0}], "usage": None}

    assert Template(document)(text) == data(document(text))


def test_streamed_chunks_are_of_the_published_types(server):
    kinds = {"/v1/chat/completions": ChatCompletionChunk, "/v1/completions": Completion}
    for path, kind in kinds.items():
        body = {"model": "demo", "stream": True} | ASKED[path] | {"max_tokens": 30, "n": 2}
        for options in ({}, {"stream_options": {"include_usage": True}}):
            lines = server.post(path, body | options)[1].decode().splitlines()
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
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


def pieces_of(groups):
    """The pieces in which a stream sends the events of each group, which are there at once."""
    sent, loop = [], asyncio.new_event_loop()

    async def main():
        running = Running([GenerationRequest([1], Options(9))], Job, 100, Metrics(dict), Delivery())

        async def events():
            async for _, event in running:
                yield event.text

        async def send(message):
            if message.get("body"):
                sent[-1].append(message["body"].decode())

        response = EventStream("/v1/completions", running, events())
        work = asyncio.ensure_future(response.stream_response(send))
        for texts in groups:
            await asyncio.sleep(0.01)
            sent.append([])
            for text in texts:
                ends = "stop" if text == "end" else None
                running._put(0, GeneratedToken(5, text, ends))
        await work

    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    return sent


GROUPS = [["a"], ["b", "c", "d"], ["e"], ["f", "end"]]


def test_events_that_are_there_at_once_go_in_one_piece():
    assert pieces_of(GROUPS) == [["".join(texts)] for texts in GROUPS]
    every = [str(i) for i in range(MOST_AT_ONCE + 1)]
    assert pieces_of([every, ["end"]]) == [["".join(every[:-1]), every[-1]], ["end"]]


def test_a_stream_that_did_not_send_before_it_waits_is_noticed(monkeypatch):
    deaf = property(lambda self: None, lambda self, send: None)
    monkeypatch.setattr(Running, "before_wait", deaf, raising=False)
    assert pieces_of(GROUPS) != [["".join(texts)] for texts in GROUPS]


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
