"""Writes blocks to their files in the background, in the order in which they come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from ...environment import logger
from .blocks import Block
from .rows import Rows
from .snapshots import Snapshots

OnSaved = Callable[[Block, int], None]


class Saver:
    """A thread that writes blocks.

    What waits stays in memory, so it is limited: a block beyond that is refused.

    Args:
        snapshots: writes them.
        limit_bytes: of the blocks that wait, but for the last one.
        on_saved: called in the thread with a block and the bytes of its file: 0 where writing it
            failed, which was warned of, or was left out.
    """

    def __init__(self, snapshots: Snapshots, limit_bytes: int, on_saved: OnSaved):
        self._snapshots, self._limit, self._on_saved = snapshots, limit_bytes, on_saved
        self._queue: queue.Queue[tuple[Block, int] | None] = queue.Queue()
        self._lock, self._waiting = threading.Lock(), 0
        self._thread = threading.Thread(target=self._run, name="prompt snapshots", daemon=True)
        self._thread.start()

    @property
    def waiting_bytes(self) -> int:
        """The bytes of blocks that wait."""
        return self._waiting

    def add(self, block: Block, *, wait: bool = False) -> bool:
        """Have a block written; False where too many wait. With ``wait`` none are too many."""
        with self._lock:
            if self._waiting >= self._limit and not wait:
                return False
            self._waiting += (nbytes := block.nbytes)
        self._queue.put((block, nbytes))
        return True

    def flush(self) -> None:
        """Wait until all blocks are written."""
        self._queue.join()

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            block, nbytes = item
            rows = block.rows
            try:
                self._on_saved(block, 0 if rows is None else self._write(block, rows))
            finally:
                with self._lock:
                    self._waiting -= nbytes
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, block: Block, rows: Rows) -> int:
        parent = block.parent
        assert parent is not None
        if block.gone or (parent.parent is not None and not parent.file_bytes):
            return 0  # a file of no use
        try:
            return self._snapshots.write(block, rows)
        except Exception as error:  # the thread goes on: others can be written, maybe
            logger.warning("[prompts] %s is not saved: %s", self._snapshots.path(block.id), error)
            return 0
