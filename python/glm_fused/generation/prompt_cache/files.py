"""Which blocks have files, and which of them give way to others."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .blocks import Block
from .rows import Rows
from .saving import Saver
from .snapshots import Found, Snapshots


class Files:
    """The files of a tree's blocks, written in the background, within a limit.

    A block's file is there only while those of the blocks before it are.

    Args:
        snapshots: the folder; the tree is filled with the blocks that it has.
        tree: an empty one.
        lock: guards the tree; the caller of each method but `read`, `flush` and `close` has it.
        limit_bytes: of all files.
        waiting_bytes: of the blocks that wait to be written.
        on_lost: called with a block whose file was deleted.
        on_saved: called after a block was written or not.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        tree: Block,
        lock: threading.RLock,
        limit_bytes: int,
        waiting_bytes: int,
        on_lost: Callable[[Block], None],
        on_saved: Callable[[], None],
    ):
        self._snapshots, self._lock, self._limit = snapshots, lock, limit_bytes
        self._on_lost, self._after = on_lost, on_saved
        self._order: OrderedDict[Block, None] = OrderedDict()  # as of blocks in memory
        self._nbytes = self._saved = self._loaded = self._lost = 0
        try:
            self._plant(tree, snapshots.index())
        except BaseException:
            snapshots.close()
            raise
        self._shrink()
        self._saver = Saver(snapshots, waiting_bytes, self._written)

    def _plant(self, tree: Block, found: Iterable[Found]) -> None:
        """Make blocks of files; those that follow none are deleted."""
        below: dict[str, list[Found]] = {}
        for file in found:
            below.setdefault(file.parent, []).append(file)
        used: dict[Block, int] = {}
        blocks = [tree]
        for parent in blocks:  # which grows
            for file in below.pop(parent.id, ()):
                block = Block(file.id, parent, file.tokens, file_bytes=file.nbytes)
                parent.children[file.tokens.tobytes()] = block
                used[block] = file.used
                blocks.append(block)
        for block in reversed(blocks[1:]):
            if block.parent is not tree and block.parent is not None:
                used[block.parent] = max(used[block.parent], used[block])
        place = {block: i for i, block in enumerate(blocks)}
        self._order.update(
            dict.fromkeys(sorted(used, key=lambda block: (used[block], -place[block])))
        )
        self._nbytes = sum(block.file_bytes for block in used)
        for file in (file for orphans in below.values() for file in orphans):
            self._snapshots.delete(file.id)

    @property
    def waiting_bytes(self) -> int:
        """The bytes of blocks that wait to be written, which stay in memory."""
        return self._saver.waiting_bytes

    def read(self, block: Block) -> Rows | None:
        """The rows of a block that has a file; None where it is damaged or gone."""
        rows = self._snapshots.read(block)
        self._loaded += rows is not None
        self._lost += rows is None
        return rows

    def save(self, chain: Sequence[Block], *, wait: bool = False) -> None:
        """Have blocks written that have no file, each after its parent, as far as they may wait."""
        for block in chain:
            if block.gone or block.rows is None or block.queued or block.file_bytes:
                continue
            if not self._saver.add(block, wait=wait):
                return
            block.queued = True

    def _written(self, block: Block, nbytes: int) -> None:
        with self._lock:
            block.queued = False
            if block.gone and nbytes:
                self._snapshots.delete(block.id)
            elif nbytes:
                self._saved += 1
                self._nbytes += nbytes
                block.file_bytes = nbytes
                self._order[block] = None
                self._to_end(block)
                self._shrink()
            self._after()

    def _to_end(self, block: Block) -> None:
        """This block and those before it were used last, and go after all below them."""
        while block.parent is not None:
            if block in self._order:
                self._order.move_to_end(block)
            block = block.parent

    def _shrink(self) -> None:
        while self._nbytes > self._limit:
            block = next(iter(self._order))
            self.remove(block)
            self._on_lost(block)

    def touch(self, chain: Sequence[Block]) -> None:
        """These blocks, each the parent of the next, are in use; a file tells later processes."""
        stored = [block for block in chain if block in self._order]
        if stored:
            self._to_end(stored[-1])
            self._snapshots.used(stored[-1])

    def remove(self, block: Block) -> None:
        """Delete the file of a block, if it has one."""
        if block in self._order:
            del self._order[block]
            self._nbytes -= block.file_bytes
            block.file_bytes = 0
            self._snapshots.delete(block.id)

    def flush(self) -> None:
        """Wait until what waits is written."""
        self._saver.flush()

    def close(self) -> None:
        """Let go of the folder, once what waits is written."""
        self._saver.close()
        self._snapshots.close()

    def describe(self) -> dict[str, Any]:
        """How much there is, JSON-ready."""
        return {
            "blocks": len(self._order),
            "bytes": self._nbytes,
            "limit_bytes": self._limit,
            "waiting_bytes": self.waiting_bytes,
            "saved_blocks": self._saved,
            "loaded_blocks": self._loaded,
            "lost_blocks": self._lost,
        }
