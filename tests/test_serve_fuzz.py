"""Requests by chance: whatever comes, the server answers, and no answer is its own fault."""

import contextlib
import json
import random
import socket
import threading
import time

import pytest
from served import served

from glm_fused.serve.openai_answer import ChatAnswer

WORKERS = 6
# A request that takes longer than time_limit has status 504, which is a fault; in it there is time
# for all that a machine may do meanwhile.
LIMITS = {"timeout": 2, "time_limit": 300, "max_body_bytes": 60_000, "max_tokens": 12}
PATIENCE = 2 * LIMITS["time_limit"]  # seconds, of clients
CHATS = ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"]
PATHS = [*CHATS, "/v1/chat/completions", "/v1/completions", "/v1/completions", "/v1/responses"]
OTHERS = [
    "/",
    "/page/main.js",
    "/page/../app.py",
    "/v1/models",
    "/v1/models/demo",
    "/v1/nothing",
    "/health",
    "/metrics",
    "//",
    "/%00",
]
TEXTS = [
    "hi", "", "def f(x):\n", "\0", "é😀" * 9, "\u202e\ufeff", "\ud800", "<|user|>", "x" * 2000,
    "{{ 7 * 7 }}{% for %}", "null", "../../etc/passwd", "a\r\nb: c", "[gMASK]<sop>",
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 10**30, 2**63, -(2**70), "", "1", [], {},
    [None], [[]], {"a": {}}, "demo", ["x"] * 20, {"type": "text"}, {"type": "function"},
]  # fmt: skip
FIELDS = [
    "model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n",
    "max_tokens", "max_completion_tokens", "stream", "stream_options", "logprobs", "top_logprobs",
    "tools", "tool_choice", "response_format", "logit_bias", "presence_penalty", "echo", "best_of",
    "suffix", "user", "system", "thinking", "input", "instructions", "text",
    "previous_response_id", "reasoning_effort", "chat_template_kwargs", "parallel_tool_calls", "é",
    "",
]  # fmt: skip
ROLES = ["user", "assistant", "system", "tool", "developer", "function", "", "User", None, 3]


class Draw(random.Random):
    """Draws requests; everything depends on its seed."""

    def value(self, depth=0):
        kind = self.random()
        if kind < 0.55 or depth > 3:
            return self.choice(VALUES)
        if kind < 0.75:
            return self.choice(TEXTS)
        if kind < 0.87:
            return [self.value(depth + 1) for _ in range(self.randrange(4))]
        return {self.choice(FIELDS): self.value(depth + 1) for _ in range(self.randrange(4))}

    def message(self):
        if self.random() < 0.1:
            return self.value()
        message = {"role": self.choice(ROLES[: self.choice([3, 10])])}
        message["content"] = self.choice(TEXTS) if self.random() < 0.8 else self.value()
        if self.random() < 0.2:
            message[self.choice(["name", "tool_calls", "tool_call_id", "refusal", "x"])] = (
                self.value()
            )
        return message

    def body(self, path):
        """A body, most of which fits."""
        body = {"model": "demo"}
        body["max_output_tokens" if "responses" in path else "max_tokens"] = self.choice([1, 2, 9])
        if path in CHATS:
            body["messages"] = [self.message() for _ in range(self.randrange(1, 4))]
        elif path == "/v1/responses":
            text = self.choice(TEXTS)
            body["input"] = self.choice([text, [self.message()], self.value()])
        else:
            tokens = [self.randrange(-1, 600) for _ in range(self.randrange(4))]
            body["prompt"] = self.choice([self.choice(TEXTS), tokens, [tokens], ["a", "b"]])
        if self.random() < 0.4:
            body["stream"] = True
        for _ in range(self.choice([0, 0, 1, 1, 2])):
            body[self.choice(FIELDS)] = self.value()
        if self.random() < 0.1:
            del body[self.choice(list(body))]
        return body

    def raw(self, body):
        """The body's bytes, at times damaged."""
        raw = json.dumps(body, allow_nan=True).encode()
        kind = self.random()
        if kind < 0.05:
            return raw[: self.randrange(len(raw))]
        if kind < 0.1:
            at = self.randrange(len(raw))
            return raw[:at] + bytes([self.randrange(256)]) + raw[at + 1 :]
        if kind < 0.12:
            return b"[" * self.randrange(1, 100_000)
        return raw

    def head(self, method, path, size):
        """A request's head, at times strange."""
        headers = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": size}
        if self.random() < 0.08:
            strange = self.choice(["Host", "Content-Type", "Content-Length", "Origin", "Expect"])
            headers[strange] = self.choice(["", "x", "-1", "9" * 30, "100-continue", "é", "0"])
        if self.random() < 0.3:
            headers["Connection"] = "close"
        lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()


def talk(port, draw):
    """Send one request, in one of the ways of clients; returns the status, None where it left."""
    path = draw.choice(PATHS) if draw.random() < 0.93 else draw.choice(OTHERS)
    method = "POST" if path in PATHS else draw.choice(["GET", "POST", "HEAD", "PUT", "\x01"])
    raw = draw.raw(draw.body(path)) if method == "POST" else b""
    request = draw.head(method, path, len(raw)) + raw
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        try:
            return exchange(client, request, draw)
        except ConnectionError:
            # Whoever takes too long is let go, which a machine with other work may be why.
            assert time.monotonic() - began > LIMITS["timeout"], request[:300]
            return None


def exchange(client, request, draw):
    """As `talk`, on a connection that is there."""
    way = draw.random()
    if way < 0.08:  # vanishes while it sends
        client.sendall(request[: draw.randrange(len(request))])
        return None
    if way < 0.16:  # is slow
        middle = draw.randrange(len(request))
        client.sendall(request[:middle])
        time.sleep(0.02)
        client.sendall(request[middle:])
    else:
        client.sendall(request)
    if way > 0.92:  # vanishes before, or while, the answer comes
        time.sleep(draw.choice([0, 0.01, 0.05]))
        if draw.random() < 0.5:
            client.recv(50)
        return None
    if draw.random() < 0.02:
        with contextlib.suppress(OSError):  # of a connection that is closed already
            client.shutdown(socket.SHUT_WR)
    return read(client)


def read(client):
    """The status of an answer, which is read whole."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in found or not complete(found):
            piece = client.recv(65536)
            if not piece:
                break
            found += piece
    return int(found.split(b" ", 2)[1]) if found else None


def complete(found):
    head, _, body = found.partition(b"\r\n\r\n")
    head = head.lower()
    if b"transfer-encoding: chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    length = [line for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
    return bool(length) and len(body) >= int(length[0].split(b":")[1])


def attack(server, seeds):
    """Talk once for each seed, from several threads; returns all statuses by seed."""
    found, left, lock = {}, list(seeds), threading.Lock()

    def work():
        while True:
            with lock:
                if not left:
                    return
                seed = left.pop()
            try:
                found[seed] = talk(server.port, Draw(seed))
            except Exception as error:
                found[seed] = error

    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def check(server, found):
    """No answer was the server's fault, every slot is free again, and it still answers."""
    faults = {s: f for s, f in found.items() if isinstance(f, Exception) or (f or 0) >= 500}
    assert not faults, faults
    server.idle()
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    status, answer = server.post("/v1/chat/completions", body)
    assert status == 200 and answer["usage"]["completion_tokens"] == 3


def test_three_hundred_requests_by_chance(engine):
    with served(engine, **LIMITS) as server:
        found = attack(server, range(300))
        check(server, found)
    statuses = list(found.values())
    assert statuses.count(200) > 30 and statuses.count(400) > 60  # they reach what they attack


@pytest.fixture(scope="module")
def attacked(engine):
    """One server for all of the slow requests."""
    with served(engine, **LIMITS) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 11_000, 500))
def test_ten_thousand_requests_by_chance(attacked, first):
    check(attacked, attack(attacked, range(first, first + 500)))


def test_a_fault_of_the_server_is_found(engine, monkeypatch):
    def broken(self, event):
        raise KeyError("planted")

    monkeypatch.setattr(ChatAnswer, "feed", broken)
    with served(engine, **LIMITS) as server, pytest.raises(AssertionError):
        check(server, attack(server, range(60)))
