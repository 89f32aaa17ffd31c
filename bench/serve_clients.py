"""Servers of OpenAI's completions and their clients, for bench_serve.py."""

from __future__ import annotations

import bisect
import http.client
import io
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

MODEL = "default_model"  # mlx-lm's name of the model that its server was started with
SECONDS = 600  # that a server may take to start, or be silent
_HEAD = (
    "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    "Content-Length: {}\r\nConnection: close\r\n\r\n"
)


class Answer(NamedTuple):
    """What a client got; its times are on the clock of `time.perf_counter`."""

    text: str
    tokens: int
    prompt_tokens: int
    began: float
    first: float
    last: float


@dataclass
class Server:
    """A server's process; what it says goes into the file ``log``."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @classmethod
    def start(cls, name: str, arguments: list[str], log: Path) -> Server:
        """Start a module of Python that takes ``--port``."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", *arguments, "--port", str(port)]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        return cls(name, process, port, log)

    def ready(self) -> None:
        """Wait until it listens; its model may still have to load."""
        end = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except ConnectionRefusedError:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(self.failure("does not listen")) from None
                time.sleep(0.1)

    def failure(self, what: object) -> str:
        """What went wrong, with the end of what the server said."""
        return f"{self.name}: {what}\n{self.log.read_text(errors='replace').strip()[-1000:]}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def __call__(self, prompts: list[str], tokens: int) -> list[Answer]:
        """What follows these prompts, asked for at once, each by a client of its own."""
        start = threading.Barrier(len(prompts))
        try:
            connections = [self.connect() for _ in prompts]
            with ThreadPoolExecutor(len(prompts)) as clients:
                asked = [
                    clients.submit(ask, connection, prompt, tokens, start)
                    for connection, prompt in zip(connections, prompts, strict=True)
                ]
                return [answer.result() for answer in asked]
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise SystemExit(self.failure(repr(error))) from error

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def ask(connection: socket.socket, prompt: str, tokens: int, start: threading.Barrier) -> Answer:
    """One client: it takes what comes as fast as it can, and understands it afterwards.

    Raises RuntimeError for an answer that is an error, OSError and HTTPException for none.
    """
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    how = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body = json.dumps(how | stream).encode()
    request = _HEAD.format(len(body)).encode() + body
    start.wait()
    began = time.perf_counter()
    came = list[tuple[float, bytes]]()
    with connection:
        connection.sendall(request)
        while part := connection.recv(1 << 16):
            came.append((time.perf_counter(), part))
    return understood(list(lines(came)), began)


def lines(came: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The lines of a response's body, with the times at which their ends came."""
    ends = list(itertools.accumulate(len(part) for _, part in came))
    stream = io.BufferedReader(io.BytesIO(b"".join(part for _, part in came)))
    response = http.client.HTTPResponse(cast(socket.socket, _Received(stream)), method="POST")
    response.begin()
    if response.status != http.client.OK:
        raise RuntimeError(f"{response.status}: {response.read().decode(errors='replace')}")
    for line in response:
        yield came[bisect.bisect_left(ends, stream.tell())][0], line


class _Received(NamedTuple):
    """What has come of a response, in the place of a socket."""

    stream: BinaryIO

    def makefile(self, mode: str) -> BinaryIO:
        return self.stream


def understood(lines: list[tuple[float, bytes]], began: float) -> Answer:
    """The answer in server-sent events, of which each line has its time of arrival."""
    pieces, usage = list[tuple[float, str]](), None
    for at, line in lines:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        usage = event.get("usage") or usage
        pieces += [(at, choice["text"]) for choice in event["choices"]]
    if usage is None or not any(text for _, text in pieces):
        raise RuntimeError(f"the answer has no text or no usage, after {len(pieces)} pieces.")
    return Answer(
        text="".join(text for _, text in pieces),
        tokens=usage["completion_tokens"],
        prompt_tokens=usage["prompt_tokens"],
        began=began,
        first=next(at for at, text in pieces if text),
        last=pieces[-1][0],
    )
