"""Ends all ranks when one fails, dies or hangs.

A rank waits for the others within collective operations, which do not end while another process is
there and does nothing. So each rank has a connection to rank 0 on which both ends say every second
that they are alive, and what they fail of.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn, Self

import mlx.core as mx

from .agreement import tell

PERIOD = 1.0  # seconds between signs of life
LIMIT = 8  # such periods without any, in which this process was awake itself
_GRACE = 1.0  # for a rank that fails by itself, as it lost another, to say why
_ALIVE, _DONE = "", "done"


class Watch:
    """A context in which this rank fails when another one does; all ranks have to enter it.

    Leaving it waits for the others to leave it, too.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group, self._rank = group, group.rank()
        self._peers: dict[int, socket.socket] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()  # nothing that comes later is a failure
        self._known = threading.Event()
        self._why = ""

    def __enter__(self) -> Self:
        server = socket.create_server((_own_address(), 0)) if self._rank == 0 else None
        address = [] if server is None else [*server.getsockname()[:2], secrets.token_hex(16)]
        host, port, token = json.loads(tell(self._group, json.dumps(address))[0])
        if server is None:
            peer = socket.create_connection((host, port), timeout=LIMIT * PERIOD)
            _send(peer, f"{token} {self._rank}")
            self._peers[0] = peer
        else:
            self._accept(server, token)
        for rank, peer in self._peers.items():
            peer.settimeout(PERIOD)
            threading.Thread(target=self._listen, args=(rank, peer), daemon=True).start()
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def _accept(self, server: socket.socket, token: str) -> None:
        with server:
            server.settimeout(LIMIT * PERIOD)
            while len(self._peers) < self._group.size() - 1:
                try:
                    peer, _ = server.accept()
                    peer.settimeout(PERIOD)
                    found, _, rank = next(_lines(peer), "").partition(" ")
                except TimeoutError:
                    missing = set(range(1, self._group.size())) - set(self._peers)
                    raise RuntimeError(
                        f"[shard] {_ranks(missing)} did not connect to {server.getsockname()}."
                    ) from None
                if secrets.compare_digest(found, token):
                    self._peers[int(rank)] = peer
                else:
                    peer.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            tell(self._group, "")  # all ranks are here
            self._end(_DONE)
            return
        lost = isinstance(error, RuntimeError) and "connection to a peer was lost" in str(error)
        if lost:
            self._known.wait(LIMIT * PERIOD)
        with self._lock:  # the process may be ending in `_lost`
            self._over.set()
        if lost and self._why:
            self._end(self._why)
            raise RuntimeError(self._why) from None
        self._end(f"[shard] rank {self._rank} failed: {str(error) or type(error).__name__}")

    def _end(self, last_words: str) -> None:
        self._over.set()
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                _send(peer, last_words)
                peer.shutdown(socket.SHUT_WR)

    def _live(self) -> None:
        """Say every second that this rank is alive."""
        while not self._over.wait(PERIOD):
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # whoever listens to it notices
                    _send(peer, _ALIVE)

    def _listen(self, rank: int, peer: socket.socket) -> None:
        why = f"[shard] rank {rank} is gone."
        try:
            for said in _lines(peer):
                if said == _DONE:
                    return
                if said != _ALIVE:
                    why = said
                    break
        except TimeoutError:
            why = f"[shard] rank {rank} has not answered for {LIMIT * PERIOD:g} s."
        except OSError:
            pass
        self._lost(why)

    def _lost(self, why: str) -> None:
        """End the process, unless it is ending by itself: it may wait in MLX for ever."""
        with self._lock:
            self._why = self._why or why
        self._known.set()
        if self._over.wait(_GRACE):
            return
        with self._lock:
            if not self._over.is_set():
                self._end(self._why)
                _exit(self._why)


def _exit(why: str) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        print(f"glm-fused: error: {why}", file=sys.stderr, flush=True)
    os._exit(2)


def _send(peer: socket.socket, line: str) -> None:
    peer.sendall(f"{' '.join(line.split())}\n".encode())


def _lines(peer: socket.socket) -> Iterator[str]:
    """The lines that a peer sends, until it ends; raises TimeoutError where it is silent.

    Time in which this process was stopped, as a machine that sleeps is, counts as one period.
    """
    silent, data = 0, b""
    while True:
        try:
            received = peer.recv(4096)
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


def _own_address() -> str:
    """The address at which the other ranks reach rank 0: the one that MLX has for it."""
    if hosts := os.environ.get("MLX_HOSTFILE"):
        with open(hosts) as file:
            return str(json.load(file)[0][0]).rpartition(":")[0]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    return socket.gethostname()


def _ranks(numbers: set[int]) -> str:
    listed = ", ".join(map(str, sorted(numbers)))
    return f"rank{'s' if len(numbers) > 1 else ''} {listed}"
