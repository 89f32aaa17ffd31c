"""``glm-fused serve --shard``: what clients get is what one process gives them."""

from __future__ import annotations

import json
import re
import signal
import threading
import time

import pytest
from served_ranks import (
    CHAT,
    CODE,
    COMMAND,
    REQUESTS,
    TEXT,
    Client,
    at_once,
    ends,
    message,
    prompt,
    sharded,
)
from tests.served import served

from glm_fused import Engine, EngineOptions
from glm_fused.cli import main


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
    at_once(client, alone, REQUESTS * 2)


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


@pytest.mark.parametrize("shard", [pytest.param("tensor", marks=pytest.mark.slow), "pipeline"])
def test_drafts_change_nothing(tmp_path, alone, shard):
    with sharded(tmp_path, "--draft", "auto", "--shard", shard) as (_, client):
        for path, body in REQUESTS[:4]:
            assert client.choices(path, body) == alone.choices(path, body)


@pytest.mark.parametrize(
    "streamed",
    [["--memory-budget", "2GB", "--slots", "5"], pytest.param([], marks=pytest.mark.slow)],
)
def test_a_pipeline_serves_the_same(tmp_path, alone, streamed):
    """Its ranks keep the same prompts, of which there is room for the last ones alone."""
    texts = [CODE + "\n" * i for i in range(3)] + [f"# {i}\n{CODE}" for i in range(3)]
    asked = [*REQUESTS, *((TEXT, prompt(text)) for text in texts), (TEXT, prompt(texts[0] + "x"))]
    with sharded(tmp_path, "--shard", "pipeline", "--prompt-cache", "2MiB", *streamed) as (
        ranks,
        client,
    ):
        for path, body in asked:
            assert client.choices(path, body) == alone.choices(path, body)
        at_once(client, alone, REQUESTS)
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        assert ends(ranks)[0] == [0, 0]


@pytest.mark.slow
def test_three_ranks_in_a_line_serve_clients_that_come_and_go(tmp_path, alone):
    """With more texts than ranks, some of which are let go of with steps on their way."""
    with sharded(tmp_path, "--shard", "pipeline", count=3) as (ranks, client):
        streams = []
        for text in ("def f(x):\n", CODE, "import os\n", "class B:\n"):
            streams.append(client.connect(CHAT, message(text, max_tokens=8000, stream=True)))
            assert streams[-1].fp.peek(1)
        for stream in streams[1::2]:
            stream.close()
        at_once(client, alone, REQUESTS)
        for stream in streams[::2]:
            stream.close()
        at_once(client, alone, REQUESTS * 2)
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        assert ends(ranks)[0] == [0, 0, 0]


@pytest.mark.parametrize(
    ("how", "shard"),
    [
        (signal.SIGKILL, "tensor"),
        (signal.SIGSTOP, "tensor"),
        pytest.param(signal.SIGKILL, "pipeline", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "pipeline", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_not_go_on_ends_requests_and_server(tmp_path, how, shard):
    with sharded(tmp_path, "--shard", shard) as (ranks, client):
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
