"""``glm-fused serve --shard``: what clients get is what one process gives them."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import threading
import time

import mlx.core as mx
import numpy as np
import pytest
import ring
from tests.served import served

from glm_fused import Engine, EngineOptions
from glm_fused.cli import main
from glm_fused.generation.batching.leading import follow
from glm_fused.generation.batching.requests import Failure, GeneratedToken, GenerationRequest
from glm_fused.generation.batching.scheduler import Scheduler
from glm_fused.generation.options import Options

COMMAND = ["-m", "glm_fused", "serve", "--model", "demo", "--port", "0", "--shard", "tensor"]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CODE = "def total(values):\n    result = 0\n    for value in values:\n" * 10
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


class Client:
    """Plain requests to a server of some port."""

    def __init__(self, port):
        self.port = port

    def connect(self, path, body):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        data = json.dumps({"model": "demo"} | body)
        connection.request("POST", path, data, {"Content-Type": "application/json"})
        return connection.getresponse()

    def post(self, path, body):
        """What it answers."""
        response = self.connect(path, body)
        found = json.loads(response.read())
        assert response.status == 200, found
        return found

    def choices(self, path, body):
        """What it answers that does not depend on requests before."""
        return self.post(path, body)["choices"]

    def stream(self, path, body):
        """The parts of its answer, joined: how many there are depends on time."""
        lines = self.connect(path, body | {"stream": True}).read().decode().split("\n\n")
        parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        choices = [part["choices"][0] for part in parts if part.get("choices")]
        text = "".join(c.get("delta", c).get("content", c.get("text")) or "" for c in choices)
        return text, choices[-1]["finish_reason"]


@contextlib.contextmanager
def sharded(folder, *options, count=2):
    """The server's ranks, and a client of it."""
    ranks = ring.start([[*COMMAND, *options]] * count, folder)
    try:
        line = ranks[0].stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, (line, ranks[0].stderr.read() if not line else "")
        yield ranks, Client(int(found[1]))
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def ends(ranks):
    """The exit codes of ranks that end by themselves, and what they wrote."""
    found = [rank.communicate(timeout=60) for rank in ranks]
    return [rank.returncode for rank in ranks], [errors for _, errors in found]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A client of a server in two ranks, which ends as it is told to and with all of them."""
    with sharded(tmp_path_factory.mktemp("ranks")) as (ranks, client):
        yield client
        for rank in ranks:  # as Ctrl-C in a terminal does
            rank.send_signal(signal.SIGINT)
        codes, errors = ends(ranks)
        assert codes == [0, 0]
        assert "Traceback" not in errors[0] + errors[1]


@pytest.fixture(scope="module")
def alone():
    """A client of a server in this process."""
    with Engine("demo", EngineOptions(prompt_cache="64MiB")) as engine, served(engine) as server:
        yield Client(server.port)


def message(text, **options):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 40, **options}


def prompt(text, **options):
    return {"prompt": text, "max_tokens": 40, "temperature": 0, **options}


REQUESTS = [
    (CHAT, message("def f(x):\n", temperature=0)),
    (CHAT, message("class A:\n", temperature=1, seed=3, top_p=0.9, logprobs=True, top_logprobs=2)),
    (TEXT, prompt("import os\n", temperature=1, seed=2**63, n=2, logprobs=3)),
    (TEXT, prompt("x = [1, 2, 3]\n" * 50, stop=["  two  spaces", "\n\n"])),
    (TEXT, prompt("for i in range(3):\n", echo=True, logprobs=1, max_tokens=8)),
    (CHAT, message("a number", temperature=0, response_format=FORM)),
]


@pytest.mark.parametrize("path, body", REQUESTS)
def test_answers_are_those_of_one_process(client, alone, path, body):
    assert client.choices(path, body) == alone.choices(path, body)


@pytest.mark.parametrize("seed", [None, 7])
def test_streams_are_those_of_one_process(client, alone, seed):
    body = message("def f(x):\n", temperature=0 if seed is None else 1, seed=seed)
    streamed, reason = client.stream(CHAT, body)
    assert (streamed, reason) == alone.stream(CHAT, body)
    assert len(streamed) > 40 and reason == "length"


def test_several_clients_at_once_get_what_each_gets_alone(client, alone):
    found = {}

    def ask(number, path, body):
        time.sleep(0.03 * number)
        found[number] = client.choices(path, body)

    asked = REQUESTS * 2
    threads = [threading.Thread(target=ask, args=(i, *each)) for i, each in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (path, body) in enumerate(asked):
        assert found[number] == alone.choices(path, body)


def test_a_client_that_goes_away_and_a_sample_without_a_seed(client, alone):
    for text in ("def f(x):\n", CODE):
        response = client.connect(CHAT, message(text, max_tokens=8000, stream=True))
        assert response.fp.peek(1)
        response.close()
    assert len(client.post(TEXT, prompt("y = 1\n", temperature=1))["choices"]) == 1
    path, body = REQUESTS[0]
    assert client.choices(path, body) == alone.choices(path, body)


def test_a_second_turn_takes_only_its_new_tokens(client, alone):
    first = client.post(TEXT, prompt(CODE))
    turn = CODE + first["choices"][0]["text"] + "\n\nclass Total:\n"
    second = client.post(TEXT, prompt(turn))
    assert second["choices"] == alone.choices(TEXT, prompt(turn))
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_drafts_change_nothing(tmp_path, alone):
    with sharded(tmp_path, "--draft", "auto") as (_, client):
        for path, body in REQUESTS[:4]:
            assert client.choices(path, body) == alone.choices(path, body)


def test_a_pipeline_serves_the_same(tmp_path, alone):
    """Its ranks keep the same prompts, of which there is room for the last ones alone."""
    texts = [CODE + "\n" * i for i in range(3)] + [f"# {i}\n{CODE}" for i in range(3)]
    asked = [*REQUESTS, *((TEXT, prompt(text)) for text in texts), (TEXT, prompt(texts[0] + "x"))]
    with sharded(tmp_path, "--shard", "pipeline", "--prompt-cache", "2MiB") as (ranks, client):
        for path, body in asked:
            assert client.choices(path, body) == alone.choices(path, body)
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        assert ends(ranks)[0] == [0, 0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_does_not_go_on_ends_requests_and_server(tmp_path, how):
    with sharded(tmp_path) as (ranks, client):
        stream = client.connect(CHAT, message("def f(x):\n", max_tokens=8000, stream=True))
        whole = []
        body = message("class A:\n", max_tokens=8000)
        asking = threading.Thread(target=lambda: whole.append(client.connect(CHAT, body)))
        asking.start()
        assert stream.fp.peek(1)
        time.sleep(0.5)
        ranks[1].send_signal(how)
        (code,), (errors,) = ends([ranks[0]])
        asking.join()
        assert code == 2
        said = re.findall(r"^glm-fused: error: \[shard\] rank 1 (is gone|has not)", errors, re.M)
        assert len(said) == 1, errors
        assert whole[0].status == 503
        last = stream.read().decode().strip().split("\n\n")[-1]
        assert "error" in json.loads(last.removeprefix("data: "))


def test_what_is_refused(capsys):
    assert main([*COMMAND[2:], "--prompt-cache-dir", "x"]) == 2
    assert "--prompt-cache-dir: not with --shard" in capsys.readouterr().err


class Said:
    """In place of other ranks: keeps what they are told."""

    def __init__(self):
        self.lines, self.error = [], None

    def say(self, text):
        self.lines.append(text)

    def fail(self, error):
        self.error = error


class Barred:
    """A constraint that allows every token but one, and fails after some."""

    def __init__(self, vocabulary, fails_after):
        self._allowed, self._left = np.arange(vocabulary) != 10, fails_after

    def allowed(self):
        if not self._left:
            raise ValueError("it is over")
        return mx.array(self._allowed)

    def accept(self, token):
        assert token != 10
        self._left -= 1


class TestFollowing:
    """The calls of the model, as rank 0 and as another rank makes them, in one process."""

    @pytest.fixture
    def calls(self, model, monkeypatch):
        """Every call of the model: how many tokens of each text, and where in the cache."""
        found, forward = [], type(model).states

        def states(self, tokens, cache=None):
            found.append((tokens.shape, cache[0].size()))
            return forward(self, tokens, cache)

        def call(self, tokens, cache=None):
            return self.head(states(self, tokens, cache)[1])

        monkeypatch.setattr(type(model), "states", states)
        monkeypatch.setattr(type(model), "__call__", call)
        return found

    def lead(self, model, engine, store):
        """Requests of several kinds; returns what the other ranks are told."""
        said, tokens = Said(), engine.encode(CODE, raw=True)
        scheduler = Scheduler(Lent(model, engine), store=store, others=said)
        ended, failures = threading.Semaphore(0), []

        def listen(fails):
            def on_event(event):
                if isinstance(event, Failure):
                    failures.append(event.error)
                    ended.release()
                elif isinstance(event, GeneratedToken):
                    if fails:
                        raise BufferError("nobody reads")
                    if event.finish_reason:
                        ended.release()

            return on_event

        requests = [
            (tokens, {}),
            ([*tokens, 7, 8, 9], {}),
            (tokens[:40], {"constraint": Barred(model.args.vocab_size, 30)}),
            (tokens[:30], {"constraint": Barred(model.args.vocab_size, 5)}),
            (tokens[:20], {"scores_prompt": True, "top_logprobs": 1}),
            (tokens[:10], {"fails": True}),
        ]
        for given, more in requests:
            on_event = listen(more.pop("fails", False))
            options = Options(max_tokens=20, temp=1.0)
            scheduler.submit(GenerationRequest(given, options, **more), on_event)
            time.sleep(0.02)
        cancelled = scheduler.submit(
            GenerationRequest(tokens[:50], Options(max_tokens=400)), listen(False)
        )
        for _ in requests:
            assert ended.acquire(timeout=60)
        cancelled.cancel()
        again = GenerationRequest([*tokens, 5], Options(max_tokens=5))
        scheduler.submit(again, listen(False))
        assert ended.acquire(timeout=60)
        scheduler.close()
        assert said.error is None
        assert sorted(map(str, failures)) == ["it is over", "nobody reads"]
        return said.lines

    def followed(self, model, engine, lines, store=None):
        left = iter(lines)
        follow(model, engine.tokenizer, None, store, lambda: next(left))
        assert list(left) == []

    def test_all_ranks_make_the_same_calls(self, model, engine, calls):
        lines = self.lead(model, engine, engine.prompt_store(1 << 24))
        made = calls[:]
        calls.clear()
        assert any(json.loads(line).get("cached", 0) > 100 for line in lines[:-1])
        self.followed(model, engine, lines, engine.prompt_store(1 << 24))
        assert calls == made and len(made) > 20

    @pytest.mark.parametrize(
        ("said", "instead"),
        [(r'"gone": \[[^]]+\]', '"gone": []'), ('"chunk": true', '"chunk": false')],
    )
    def test_what_is_not_followed_shows_in_the_calls(self, model, engine, calls, said, instead):
        """The control of the test above."""
        lines = [re.sub(said, instead, line) for line in self.lead(model, engine, None)]
        made = calls[:]
        calls.clear()
        with contextlib.suppress(StopIteration, KeyError, IndexError, AssertionError):
            self.followed(model, engine, lines)
        assert calls != made

    def test_a_store_that_keeps_other_things_is_noticed(self, model, engine):
        lines = self.lead(model, engine, engine.prompt_store(1 << 24))
        with pytest.raises(RuntimeError, match=r"begins with \d+ that rank 0 has kept, and 0 here"):
            self.followed(model, engine, lines)

    def test_an_error_of_the_model_ends_all_ranks(self, model, engine, monkeypatch):
        def fails(self, tokens, cache=None):
            raise RuntimeError("out of paper")

        monkeypatch.setattr(type(model), "states", fails)
        said, failed = Said(), threading.Event()
        scheduler = Scheduler(Lent(model, engine), others=said)
        scheduler.submit(
            GenerationRequest([1, 2, 3], Options(max_tokens=5)), lambda e: failed.set()
        )
        assert failed.wait(60)
        scheduler.close()
        assert str(said.error) == "out of paper"
        assert said.lines[-1] == "end"


class Lent:
    """An engine whose model is another one's."""

    def __init__(self, model, engine):
        self.model, self.tokenizer, self.drafts = model, engine.tokenizer, None
