"""Which blocks have their rows in memory, and which of them give way to others."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from .blocks import Block
from .rows import Rows


class Resident:
    """The blocks whose rows are in memory, the one that was used last at the end.

    A block comes after all below it, which so are the first to go. Callers guard it by a lock.

    Attributes:
        nbytes: of all rows and their tokens.
        limit: what `excess` leaves.
    """

    def __init__(self, limit: int):
        self.limit, self.nbytes = limit, 0
        self._order: OrderedDict[Block, None] = OrderedDict()

    def keep(self, block: Block, rows: Rows) -> None:
        """Have these rows of a block in memory."""
        if block in self._order:
            self.nbytes -= block.nbytes
        block.rows = rows  # at no time None: it may be being written
        self._order[block] = None
        self.nbytes += block.nbytes

    def drop(self, block: Block) -> None:
        """Let go of a block's rows, if they are there."""
        if block in self._order:
            del self._order[block]
            self.nbytes -= block.nbytes
        block.rows = None

    def touch(self, chain: Sequence[Block]) -> None:
        """These blocks, each the parent of the next, are in use."""
        for block in reversed(chain):
            if block in self._order:
                self._order.move_to_end(block)

    def excess(self) -> Iterator[Block]:
        """The blocks that are too many, but for those that wait to be written."""
        if self.nbytes > self.limit:
            for block in list(self._order):
                if self.nbytes <= self.limit:
                    return
                if not block.queued and not block.gone:
                    yield block
