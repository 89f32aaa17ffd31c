"""Clients that do not behave: they go away, send slowly, or read nothing."""

import contextlib
import json
import socket
import time

import pytest
from served import served

from glm_fused.serve import running

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(engine):
    with served(engine, send_buffer=4096, timeout=2) as server:
        yield server


def request(**fields):
    """The bytes of a request."""
    body = json.dumps({"model": "demo", "messages": HI} | fields).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connect(server, receive_buffer=None):
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(30)
    client.connect(("127.0.0.1", server.port))
    return client


def generated(server):
    return server.service.scheduler.describe()["tokens_generated"]


def still_answers(server):
    body = {"model": "demo", "messages": HI, "max_tokens": 2}
    status, found = server.post(CHAT, body)
    assert status == 200 and found["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [True, False])
def test_one_that_goes_away_takes_its_request_with_it(server, stream):
    before = generated(server)
    with connect(server) as client:
        client.sendall(request(stream=stream, max_tokens=3000))
        while generated(server) < before + 5:
            time.sleep(0.005)
    server.idle()
    assert generated(server) < before + 2500
    still_answers(server)


def test_one_that_sends_too_slowly_is_let_go(server):
    whole = request(max_tokens=2)
    with connect(server) as slow:
        slow.sendall(whole[:-5])
        assert b" 408 " in slow.recv(1000)
    for start in (b"", b"POST /v1/chat"):
        with connect(server) as slow:
            slow.sendall(start)
            with contextlib.suppress(ConnectionResetError):
                assert slow.recv(1000) == b""
    with connect(server) as patient:  # the control: slow, but within its time
        for i in range(0, len(whole), 40):
            patient.sendall(whole[i : i + 40])
            time.sleep(0.01)
        assert b" 200 " in patient.recv(1000)


def test_one_that_reads_nothing_is_dropped(server):
    before = generated(server)
    fields = {"stream": True, "logprobs": True, "top_logprobs": 20}
    with connect(server, receive_buffer=4096) as deaf:
        deaf.sendall(request(max_tokens=4000, **fields))
        while generated(server) < before + 5:
            time.sleep(0.005)
        server.idle()
        assert generated(server) < before + 3500
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := deaf.recv(1 << 16):
                found += piece
        assert b"[DONE]" not in found
    still_answers(server)


def test_what_is_left_unread_is_bounded(engine, monkeypatch):
    monkeypatch.setattr(running, "MOST_EVENTS", 20)
    with served(engine, send_buffer=4096, timeout=60) as server:
        fields = {"stream": True, "logprobs": True, "top_logprobs": 20}
        with connect(server, receive_buffer=4096) as deaf:
            deaf.sendall(request(max_tokens=4000, **fields))
            time.sleep(0.5)
            server.idle(60)
            found = b""
            while b"0\r\n\r\n" not in found[-10:]:
                found += deaf.recv(1 << 16)
        assert b"tokens were left unread" in found and b"[DONE]" not in found
        still_answers(server)
