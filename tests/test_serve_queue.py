"""Requests that wait for others: streams stay alive meanwhile, and hear when the server ends."""

import http.client
import json
import threading

import anthropic
import openai
import pytest
from served import served

from glm_fused.serve import streams

USER = [{"role": "user", "content": "def f(x):\n"}]
CHAT = "/v1/chat/completions"
LONG = {"model": "demo", "messages": USER, "max_tokens": 8000, "stream": True}
SHORT = {
    CHAT: {"messages": USER, "max_tokens": 4},
    "/v1/completions": {"prompt": "x", "max_tokens": 4},
    "/v1/messages": {"messages": USER, "max_tokens": 4},
    "/v1/responses": {"input": "x", "max_output_tokens": 4},
}
ENDS = {
    CHAT: "[DONE]",
    "/v1/completions": "[DONE]",
    "/v1/messages": '"message_stop"',
    "/v1/responses": '"response.incomplete"',
}


class Stream:
    """A stream of events whose head is there; a context manager."""

    def __init__(self, server, path, body):
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        headers = {"Content-Type": "application/json"}
        whole = json.dumps({"model": "demo", "stream": True} | body)
        self._connection.request("POST", path, whole, headers)
        self._response = self._connection.getresponse()
        assert self._response.status == 200

    def until(self, line):
        """The lines up to this one."""
        found = []
        while not found or found[-1] != line:
            raw = self._response.readline()
            assert raw, (line, found)
            found.append(raw.decode().rstrip("\n"))
        return found

    def last(self):
        """The last event, the stream being read to its end."""
        lines = self._response.read().decode().splitlines()
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")][-1]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._connection.close()


@pytest.fixture(scope="module")
def narrow(engine):
    """A server that generates for one request at a time."""
    with served(engine, max_batch=1) as server:
        yield server


@pytest.mark.parametrize("path", SHORT)
def test_a_stream_in_the_queue_hears_that_it_is_waited_for(narrow, monkeypatch, path):
    monkeypatch.setattr(streams, "KEEP_ALIVE", 0.02)
    with Stream(narrow, CHAT, LONG) as long:
        long.until("")
        with Stream(narrow, path, SHORT[path]) as queued:
            begun = queued.until(": waiting")
            # Some APIs begin with events that tell nothing of the answer.
            assert sum(line.startswith("data: ") for line in begun) <= 2
            assert queued.until(": waiting") == ["", ": waiting"]
            assert narrow.service.scheduler.describe()["queued"] == 1
            long.__exit__()
            assert ENDS[path] in queued.last()
    narrow.idle()


def test_no_client_minds(narrow, engine, monkeypatch):
    """Official ones get their answers, past comments before, and maybe within, them."""
    monkeypatch.setattr(streams, "KEEP_ALIVE", 0.001)
    expected = engine.generate(USER, max_tokens=30).text
    url = narrow.url
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        fields = {"model": "demo", "messages": USER, "max_tokens": 30}
        chunks = list(client.chat.completions.create(**fields, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == expected
        with client.responses.stream(model="demo", input=USER, max_output_tokens=30) as stream:
            assert list(stream)[-1].response.output_text == expected
    with (
        anthropic.Anthropic(base_url=url, api_key="-", max_retries=0) as client,
        client.messages.stream(**fields) as stream,
    ):
        assert "".join(stream.text_stream) == expected


def test_a_stream_that_comes_quickly_has_no_such_comments(narrow):
    with Stream(narrow, CHAT, SHORT[CHAT]) as stream:
        assert ": waiting" not in stream.until("data: [DONE]")


def test_what_runs_and_what_waits_is_told_that_the_server_ends(engine):
    found, whole = {}, {}

    def read(path, stream):
        with stream:
            found[path] = stream.last()

    def ask(path):
        whole[path] = server.post(path, {"model": "demo"} | SHORT[path])

    with served(engine, max_batch=1, grace=0) as server:
        readers = [threading.Thread(target=read, args=("runs", Stream(server, CHAT, LONG)))]
        for path in SHORT:
            stream = Stream(server, path, SHORT[path])
            readers.append(threading.Thread(target=read, args=(path, stream)))
            readers.append(threading.Thread(target=ask, args=(path,)))
        for reader in readers:
            reader.start()
        server.wait_for("queued", 2 * len(SHORT))
    for reader in readers:
        reader.join()
    for path in ("runs", CHAT, "/v1/completions"):
        assert json.loads(found[path])["error"]["code"] == "server_ending"
    assert json.loads(found["/v1/messages"])["error"]["type"] == "overloaded_error"
    failed = json.loads(found["/v1/responses"])
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"]["message"] == "The server is ending."
    for path in SHORT:
        status, error = whole[path]
        assert (status, error["error"]["message"]) == (503, "The server is ending.")


def test_what_waits_still_has_its_turn_within_the_grace(engine):
    last = []

    def read(stream):
        with stream:
            last.append(stream.last())

    with served(engine, max_batch=1, grace=60) as server:
        streams = [Stream(server, CHAT, LONG | {"max_tokens": 300}) for _ in range(3)]
        readers = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for reader in readers:
            reader.start()
        assert server.service.scheduler.describe()["queued"] > 0
    for reader in readers:
        reader.join()
    assert last == ["[DONE]"] * 3
