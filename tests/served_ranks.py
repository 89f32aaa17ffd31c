"""A server in several ranks on this machine, a client of it, and what that asks for."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
import time

import ring

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
    (CHAT, message("a number", temperature=1, seed=4, response_format=FORM)),
]


def at_once(client, alone, asked):
    """Ask for all of these at about the same time; each gets what it gets ``alone``."""
    found = {}

    def ask(number, path, body):
        time.sleep(0.03 * number)
        found[number] = client.choices(path, body)

    threads = [threading.Thread(target=ask, args=(i, *each)) for i, each in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (path, body) in enumerate(asked):
        assert found[number] == alone.choices(path, body)
