"""The command ``glm-fused serve``: its options, how it starts, and how it ends."""

import argparse
import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from glm_fused.cli import main, serve

CHAT = "/v1/chat/completions"
BODY = {"model": "demo", "messages": [{"role": "user", "content": "def f(x):\n"}]}


def fails(capsys, *args):
    """The line that the command ends with, with exit code 2."""
    assert main(["serve", "--model", "demo", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others can connect, so it needs --api-key-file"),
        (["--host", "::"], "or --no-api-key, which lets everybody in"),
        (["--api-key", "a", "--no-api-key"], "--api-key, --no-api-key: expected one of them"),
        (["--api-key", "a b"], "api_key is empty or has spaces"),
        (["--api-key-file", "/nowhere/key"], "/nowhere/key"),
        (["--cors-origin", "a.example"], "cors_origins has 'a.example'"),
        (["--max-body", "16"], "--max-body: expected a size with its unit"),
        (["--prompt-cache", "3"], "--prompt-cache: expected a size with its unit"),
        (["--prompt-cache", "0", "--prompt-cache-dir", "x"], "needs a --prompt-cache above 0"),
        (["--slots", "4", "--pins", "x"], "--pins and --policy pinned need one another"),
        (["--host", "no.such.host.invalid", "--no-api-key"], "cannot listen on no.such.host"),
    ],
)
def test_options_that_do_not_fit(capsys, monkeypatch, args, message):
    monkeypatch.delenv("GLM_FUSED_API_KEY", raising=False)
    assert message in fails(capsys, *args)


@pytest.mark.parametrize(
    ("model", "given", "names"),
    [
        ("demo", [], ("demo",)),
        ("some/folder/glm-5.2", [], ("glm-5.2",)),  # which exists
        ("zai-org/GLM-5.2", [], ("GLM-5.2", "zai-org/GLM-5.2")),
        ("zai-org/GLM-5.2@v1:UD-Q4", [], ("GLM-5.2", "zai-org/GLM-5.2")),
        ("zai-org/GLM-5.2", ["--name", "a", "--name", "b"], ("a", "b")),
    ],
)
def test_what_clients_may_call_the_model(tmp_path, monkeypatch, model, given, names):
    (tmp_path / "some" / "folder" / "glm-5.2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = parser.parse_args(["--model", model, *given])
    assert serve._settings(options).names == names


def test_an_address_that_is_taken_is_known_before_the_model_loads(capsys, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("loads")

    monkeypatch.setattr("glm_fused.cli.serve.open_engine", load)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}" in fails(capsys, "--port", str(port))


def test_a_library_that_is_missing_is_named_with_what_installs_it(capsys, monkeypatch):
    find = importlib.util.find_spec
    hidden = {"uvicorn", "llguidance"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )
    expected = "serve needs uvicorn, llguidance: pip install 'glm-fused[serve]'."
    assert expected in fails(capsys)


class Process:
    """The command in a process of its own."""

    def __init__(self, *args, model="demo", **environment):
        command = [sys.executable, "-m", "glm_fused", "serve", "--model", model, "--port", "0"]
        variables = {k: v for k, v in os.environ.items() if k != "GLM_FUSED_API_KEY"}
        self.process = subprocess.Popen(
            [*command, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables | environment,
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, (line, self.process.stderr.read() if not line else "")
        self.line, self.port = line, int(found[1])

    def connect(self, method, path, body=None, **headers):
        """The response to a request, not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else json.dumps(body)
        given = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, data, given | headers)
        return connection.getresponse()

    def end(self, *signals):
        """Exit code and stderr after these signals."""
        for sent in signals:
            self.process.send_signal(sent)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err

    def refuses(self):
        """Whether nobody can connect any more."""
        try:
            socket.create_connection(("127.0.0.1", self.port), 5).close()
        except OSError:
            return True
        return False


@contextlib.contextmanager
def running(*args, **options):
    process = Process(*args, **options)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


def wait_until(what, seconds=30):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def streamed(response):
    """The text of a stream, and its last event."""
    events = [e for e in response.read().decode().split("\n\n") if e.startswith("data: ")]
    documents = [json.loads(e[6:]) for e in events if e != "data: [DONE]"]
    deltas = [d["choices"][0]["delta"].get("content") for d in documents if d.get("choices")]
    return "".join(delta or "" for delta in deltas), events[-1]


def test_it_says_where_it_is_answers_and_finishes_what_runs_when_it_is_told_to_end():
    names = ("--name", "glm", "--name", "gpt-4o", "--verbose")
    with running(*names, GLM_FUSED_API_KEY="secret") as server:
        assert server.line.startswith("glm, gpt-4o: http://127.0.0.1:")
        assert "with its key" in server.line
        assert json.loads(server.connect("GET", "/health").read())["status"] == "ok"
        assert server.connect("GET", "/v1/models").status == 401
        key = {"x-api-key": "secret"}
        models = json.loads(server.connect("GET", "/v1/models", **key).read())
        assert [model["id"] for model in models["data"]] == ["glm", "gpt-4o"]
        body = BODY | {"model": "gpt-4o", "max_tokens": 400, "stream": True}
        response = server.connect("POST", CHAT, body, **key)
        response.fp.peek(1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(server.refuses)
        assert server.process.poll() is None  # the request still runs
        text, last = streamed(response)
        assert last == "data: [DONE]" and len(text) > 400
        code, err = server.end()
    assert code == 0
    assert "SIGTERM: running requests have 10 s to end" in err
    assert re.search(r"127.0.0.1 POST '/v1/chat/completions' 200, .* 400 generated", err)
    assert "Traceback" not in err and "secret" not in err


def test_what_outlasts_the_grace_is_told_so():
    with running("--grace", "1", "--json") as server:
        response = server.connect("POST", CHAT, BODY | {"max_tokens": 8000, "stream": True})
        response.fp.peek(1)
        began = time.monotonic()
        code, err = server.end(signal.SIGINT)
        assert code == 0 and time.monotonic() - began < 20
        _, last = streamed(response)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_ending"
    lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line.get("path") == CHAT]
    assert line["status"] == 200 and 0 < line["generated_tokens"] < 8000
    assert "Traceback" not in err


def test_a_second_signal_ends_it_at_once():
    with running("--grace", "600") as server:
        response = server.connect("POST", CHAT, BODY | {"max_tokens": 8000, "stream": True})
        response.fp.peek(1)
        server.process.send_signal(signal.SIGINT)
        wait_until(server.refuses)
        assert server.end(signal.SIGINT)[0] == 128 + signal.SIGINT


def test_a_model_that_does_not_load_leaves_nothing_listening(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "glm_fused", "serve", "--model", str(tmp_path)]
    found = []

    def try_to_connect(process):
        while process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                found.append(True)
            time.sleep(0.01)

    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    thread = threading.Thread(target=try_to_connect, args=[process])
    thread.start()
    _, err = process.communicate(timeout=120)
    thread.join()
    assert process.returncode == 2 and not found
    assert err.startswith("glm-fused: error: ") and len(err.splitlines()) == 1
    try_to_connect_control(port)


def try_to_connect_control(port):
    """The port is one that a server could have had."""
    with socket.create_server(("127.0.0.1", port)):
        socket.create_connection(("127.0.0.1", port), 1).close()
