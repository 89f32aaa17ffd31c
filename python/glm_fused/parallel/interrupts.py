"""SIGINT while the main thread is in a library that does not let Python handle it."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_interrupt(then: Callable[[], None]) -> Iterator[None]:
    """Call ``then`` in another thread as soon as SIGINT comes within the block.

    Python's own handler runs in the main thread as well, once that is back in Python.
    """
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)

    def listen() -> None:
        with ours:
            while received := ours.recv(64):
                if signal.SIGINT in received:
                    then()

    threading.Thread(target=listen, daemon=True).start()
    with pythons:
        before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)


@contextlib.contextmanager
def ending_at_interrupts() -> Iterator[None]:
    """SIGINT ends the process at once within the block, which holds Python's lock."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
