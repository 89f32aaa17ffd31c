"""A connection between two ranks, on which each says lines of text."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

PERIOD = 1.0  # seconds between signs of life
LIMIT = 5  # such periods without any, in which this process was awake itself


class Peer:
    """The other end of a connection.

    Attributes:
        lines: what it says, until it ends; raises TimeoutError where it is silent for `LIMIT`
            periods. Time in which this process was stopped, as a machine that sleeps is, counts as
            one period.
    """

    def __init__(self, connection: socket.socket):
        self._connection, self._said = connection, connection.dup()
        self._lock = threading.Lock()
        connection.settimeout(PERIOD)
        self._said.settimeout(LIMIT * PERIOD)
        self.lines = self._lines()

    @classmethod
    def connect(cls, host: str, port: int) -> Peer:
        """Connect to a rank. Raises OSError, also where it does not answer in time."""
        return cls(socket.create_connection((host, port), timeout=LIMIT * PERIOD))

    def say(self, line: str) -> None:
        """Say a line, from any thread. Raises OSError where nobody is there or nobody listens."""
        with self._lock:
            self._said.sendall(f"{line}\n".encode())

    def end(self, last_words: str) -> None:
        """Say something for the last time, to whoever is there."""
        with contextlib.suppress(OSError):
            self.say(" ".join(last_words.split()))
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._connection.close()
        self._said.close()

    def _lines(self) -> Iterator[str]:
        silent, data = 0, b""
        while True:
            try:
                received = self._connection.recv(4096)
            except TimeoutError:
                silent += 1
                if silent >= LIMIT:
                    raise
                continue
            if not received:
                return
            silent = 0
            *lines, data = (data + received).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
