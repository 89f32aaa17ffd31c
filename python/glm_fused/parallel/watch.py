"""Ends all ranks when one fails, dies or hangs.

A rank waits for the others within collective operations, which do not end while another process is
there and does nothing. So each rank has a connection to rank 0 on which both ends say every second
that they are alive, and what they fail of.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

import mlx.core as mx

from .agreement import tell
from .meeting import meeting
from .peer import LIMIT, PERIOD, Peer

_SHORT = 0.05  # seconds, between looks at who has arrived
_GRACE = 1.0  # for a rank that fails by itself, as it lost another, to say why
_SHORT_GRACE = 0.5  # for one that cannot
_ALIVE, _DONE, _ORDER = "", "done", "> "  # what is said; all else are last words
_FAILED, _INTERRUPTED = 2, 130  # exit codes, as the command line has them


class Watch:
    """A context in which this rank fails when another one does; all ranks have to enter it.

    Leaving it waits for the others to leave it, too. Within it the process ends as well where its
    stdin is a pipe whose writer is gone: `mlx.launch` was killed. It belongs to the main thread.

    Attributes:
        before_end: is called before another rank's failure ends this process, from any thread; what
            it starts has a moment.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group, self._rank = group, group.rank()
        self._peers: dict[int, Peer] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()  # nothing that comes later is a failure
        self._known = threading.Event()
        self._why, self._interrupted = "", False
        self._stdin = _pipe_of_stdin()
        self._orders = queue.SimpleQueue[str]()
        self.before_end: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        server = socket.create_server((_own_address(), 0)) if self._rank == 0 else None
        address = [] if server is None else [*server.getsockname()[:2], secrets.token_hex(16)]
        with meeting():  # nobody is watched yet
            host, port, token = json.loads(tell(self._group, json.dumps(address))[0])
        if server is None:
            peer = Peer.connect(host, port)
            peer.say(f"{token} {self._rank}")
            self._peers[0] = peer
        else:
            self._accept(server, token)
        for rank, peer in self._peers.items():
            threading.Thread(target=self._listen, args=(rank, peer), daemon=True).start()
        threading.Thread(target=self._live, daemon=True).start()
        return self

    def _accept(self, server: socket.socket, token: str) -> None:
        """Wait for all others. Strangers may connect, too, and say anything or nothing."""

        def meet(peer: Peer) -> None:
            found = rank = ""
            with contextlib.suppress(OSError):
                found, _, rank = next(peer.lines, "").partition(" ")
            if secrets.compare_digest(found.encode(), token.encode()):
                self._peers[int(rank)] = peer
            else:
                peer.close()

        end = time.monotonic() + LIMIT * PERIOD
        with server:
            server.settimeout(_SHORT)
            while missing := set(range(1, self._group.size())) - set(self._peers):
                if time.monotonic() > end:
                    address = server.getsockname()
                    raise RuntimeError(f"[shard] {_ranks(missing)} did not connect to {address}.")
                with contextlib.suppress(TimeoutError):
                    peer = Peer(server.accept()[0])
                    threading.Thread(target=meet, args=(peer,), daemon=True).start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait_for_all()
            self._end(_DONE)
            return
        if lost := _is_lost(error):
            self._known.wait(LIMIT * PERIOD)
        with self._lock:  # the process may be ending in `_lost`
            self._over.set()
        if self._interrupted or isinstance(error, KeyboardInterrupt):
            self._end(self._of_interrupt())
            raise KeyboardInterrupt from None
        if lost and self._why:
            self._end(self._why)
            raise RuntimeError(self._why) from None
        self._end(f"[shard] rank {self._rank} failed: {_words(error)}")

    def say(self, text: str) -> None:
        """Rank 0 tells the others a line, from any thread; each gets it by `hear`.

        Raises OSError where one of them is gone or does not read.
        """
        for peer in self._peers.values():
            peer.say(f"{_ORDER}{text}")

    def hear(self) -> str:
        """The next line that rank 0 has told; waits for it."""
        return self._orders.get()

    def wait_for_all(self) -> None:
        """Wait until all ranks have come here."""
        tell(self._group, "")

    def fail(self, error: BaseException) -> None:
        """End all ranks because of an error here; from a thread that is not the main one."""
        if _is_lost(error):
            self._known.wait(LIMIT * PERIOD)
        self._lost(f"[shard] rank {self._rank} failed: {_words(error)}")

    def interrupt(self) -> None:
        """SIGINT has come: end the process, unless it ends by itself.

        Python's own handler has to wait until MLX returns, which waits for other ranks.
        """
        self._interrupted = True
        self._lost(self._of_interrupt())

    def _of_interrupt(self) -> str:
        return f"[shard] rank {self._rank} was interrupted."

    def _end(self, last_words: str) -> None:
        self._over.set()
        for peer in self._peers.values():
            peer.end(last_words)

    def _live(self) -> None:
        """Say every second that this rank is alive, for as long as it is to be."""
        while not self._over.wait(PERIOD):
            for peer in self._peers.values():
                with contextlib.suppress(OSError):  # whoever listens to it notices
                    peer.say(_ALIVE)
            if self._stdin is not None and self._stdin.poll(0):
                self._lost("[shard] the process that started the ranks is gone.")

    def _listen(self, rank: int, peer: Peer) -> None:
        why = f"[shard] rank {rank} is gone."
        grace = _GRACE
        try:
            for said in peer.lines:
                if said == _DONE:
                    return
                if said.startswith(_ORDER):
                    self._orders.put(said.removeprefix(_ORDER))
                elif said != _ALIVE:
                    why = said
                    break
        except TimeoutError:
            why = f"[shard] rank {rank} has not answered for {LIMIT * PERIOD:g} s."
            grace = _SHORT_GRACE  # MLX waits on
        except OSError:
            pass
        self._lost(why, grace)

    def _lost(self, why: str, grace: float = _GRACE) -> None:
        """End the process, unless it is ending by itself: it may wait in MLX for ever."""
        with self._lock:
            self._why = self._why or why
        self._known.set()
        self.before_end()
        if self._over.wait(grace):
            return
        with self._lock:
            if not self._over.is_set():
                self._end(self._why)
                self._exit()

    def _exit(self) -> NoReturn:
        if self._interrupted:
            os._exit(_INTERRUPTED)
        with contextlib.suppress(OSError, ValueError):
            print(f"glm-fused: error: {self._why}", file=sys.stderr, flush=True)
        os._exit(_FAILED)


def _is_lost(error: BaseException) -> bool:
    """Whether MLX noticed that another rank is gone."""
    return isinstance(error, RuntimeError) and "connection to a peer was lost" in str(error)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _pipe_of_stdin() -> select.poll | None:
    """What tells that nobody writes to stdin any more; None where it is no pipe."""
    try:
        if not stat.S_ISFIFO(os.fstat(0).st_mode):
            return None
    except OSError:  # it is closed
        return None
    poll = select.poll()
    poll.register(0, 0)  # for nothing but its end
    return poll


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
