"""Caches of earlier texts, from which a new one that begins like them goes on.

What is kept are blocks of rows (`blocks`), found by the tokens themselves. Texts that begin alike
share blocks. Caches are copied in and out, so a text that goes on changes nothing that is kept. A
text of which only a part fits in the limit is kept up to there.

With a folder every block is written to a file as well, in the background as soon as it is put, and
stays there when it has to leave memory; closing writes what is left. So a process that is killed
loses what was put last, and rows are read again when a text begins like them. What was not used for
longest goes first, in memory and in the folder.

On the CPU a row has the same bits whether a prompt or a decode step made it, so a text that goes on
from here is that of its whole prompt, bit for bit. Metal sums prompts in another order than decode
steps; there rows are those that the first text had.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.models.cache import CacheList

from ...models.decoder import Model
from ...models.pipeline import StagedModel
from ..planning import cache_format
from .blocks import Block, Match, add_child, as_tokens, child, find, prefixes
from .files import Files
from .resident import Resident
from .rows import Piece, Rows, checked, cut, join
from .snapshots import Identity, Snapshots

BLOCK_TOKENS = 256
DISK_BYTES = 32 * 10**9


@dataclass
class _Counts:
    """How often the store was asked, and what it had."""

    asked: int = 0
    hits: int = 0
    asked_tokens: int = 0
    hit_tokens: int = 0
    put: int = 0
    evicted_blocks: int = 0


class PromptStore:
    """Keeps the caches of texts, and gives copies of those that a new text begins with.

    One thread takes and puts; any may ask for `describe` and `nbytes`. It is a context manager, and
    leaving it closes the store.
    """

    def __init__(
        self,
        model: Model,
        limit_bytes: int,
        folder: str | os.PathLike[str] | None = None,
        *,
        model_id: str | None = None,
        disk_bytes: int = DISK_BYTES,
        block_tokens: int = BLOCK_TOKENS,
    ):
        """An empty store, or that of the files in ``folder``.

        Args:
            model: whose caches these are.
            limit_bytes: what rows may take in memory, those of all layers where ranks share them.
            folder: where blocks are kept in files, too; None: nowhere.
            model_id: what identifies config and weights, which files need;
                `glm_fused.checkpoint.identity.checkpoint_id` gives it.
            disk_bytes: what the files may take.
            block_tokens: how many tokens share a block.

        Raises ValueError for a folder that cannot be made, that another process has, or that has
        files of another model, format, program or version.
        """
        if limit_bytes < 0 or disk_bytes < 0:
            raise ValueError(f"[prompts] limits {limit_bytes}, {disk_bytes}: expected at least 0.")
        if folder is not None and model_id is None:
            raise ValueError("[prompts] a folder needs a model_id.")
        self._model, self._size = model, block_tokens
        self._format = None if model.kv_format == "auto" else model.kv_format
        identity = Identity(model_id or "", model.kv_format, block_tokens)
        self._tree = identity.root()
        self._lock, self._counts = threading.RLock(), _Counts()
        if isinstance(model, StagedModel):
            limit_bytes = model.own_limit(limit_bytes, cache_format(model))
        self._resident = Resident(limit_bytes)
        self._files: Files | None = None
        if folder is not None:
            snapshots = Snapshots(Path(folder), identity)
            limits, then = (disk_bytes, limit_bytes), (self._lost_file, self._evict)
            self._files = Files(snapshots, self._tree, self._lock, *limits, *then)

    @property
    def nbytes(self) -> int:
        """The bytes of all rows in memory, and of their tokens."""
        return self._resident.nbytes

    @property
    def limit_bytes(self) -> int:
        """What they may be at most."""
        return self._resident.limit

    def take(self, tokens: Sequence[int]) -> tuple[list[CacheList], int]:
        """A cache of the first n of ``tokens``, as many as are known, and n, which may be 0.

        The cache is the caller's. It has no room to grow, so the first token more copies it.
        """
        wanted = as_tokens(tokens)
        with self._lock:
            matches = find(self._tree, wanted, self._size)
        pieces = self._pieces(matches)
        with self._lock:
            self._touch([match.block for match in matches[: len(pieces)]])
        cache, count = join(self._model, pieces), sum(piece.tokens for piece in pieces)
        with self._lock:
            self._counts.asked += 1
            self._counts.asked_tokens += len(wanted)
            self._counts.hits += count > 0
            self._counts.hit_tokens += count
        return cache, count

    def _pieces(self, matches: Sequence[Match]) -> list[Piece]:
        """The rows of matches, from files where they are not in memory, up to one that is lost."""
        pieces = []
        for block, count in matches:
            rows = block.rows
            if rows is None:
                rows = None if self._files is None else self._files.read(block)
                with self._lock:
                    if rows is None or block.gone:
                        self._remove(block)
                        break
                    self._resident.keep(block, rows)
            pieces.append(Piece(rows, count))
        return pieces

    def put(self, tokens: Sequence[int], cache: Sequence[CacheList]) -> None:
        """Keep a copy of the rows that ``cache`` has of the first of ``tokens``.

        Args:
            tokens: a text; there may be more than rows, or fewer.
            cache: the model's, of this text alone (not of a batch).

        Raises ValueError for a cache that is not the model's.
        """
        size, self._format = checked(self._model.args, cache, self._format)
        known = as_tokens(tokens)[:size]
        chain: list[Block] = []
        parent, nbytes = self._tree, 0
        for first in range(0, len(known), self._size):
            part = known[first : first + self._size]
            rows = None
            if self._lacks(parent, part):
                rows = cut(cache, first, first + len(part))
                nbytes += rows.nbytes + part.nbytes
                if nbytes > self.limit_bytes - self._waiting():
                    break  # what comes after it would go first
            with self._lock:
                block = self._place(parent, part, rows)
                if block is None:
                    break
                chain.append(block)
                self._resident.touch(chain)
                self._evict()
            parent = block
        with self._lock:
            self._counts.put += 1
            self._touch(chain)
            if self._files is not None:
                self._files.save(chain)

    def _waiting(self) -> int:
        return 0 if self._files is None else self._files.waiting_bytes

    def _lacks(self, parent: Block, tokens: np.ndarray) -> bool:
        """Whether nothing is kept of these tokens, in memory or in a file."""
        with self._lock:
            return child(parent, tokens) is None

    def _place(self, parent: Block, tokens: np.ndarray, rows: Rows | None) -> Block | None:
        """The block of these tokens below a parent; one with ``rows`` is new.

        None where it, or the parent, went in the meantime.
        """
        block = child(parent, tokens)
        if parent.gone:
            return None
        if block is None and rows is not None:
            shorter = prefixes(parent, tokens)
            block = add_child(parent, tokens.copy())
            for other in shorter:
                self._remove(other)
            self._resident.keep(block, rows)
        return block

    def _touch(self, chain: Sequence[Block]) -> None:
        """These blocks, each the parent of the next, are in use."""
        self._resident.touch(chain)
        if self._files is not None:
            self._files.touch(chain)
        self._evict()

    def _evict(self) -> None:
        """Let go of rows beyond the limit, and of blocks that have no file besides."""
        for block in self._resident.excess():
            self._counts.evicted_blocks += 1
            if block.file_bytes:
                self._resident.drop(block)
            else:
                self._remove(block)

    def _lost_file(self, block: Block) -> None:
        if block.rows is None:
            self._remove(block)

    def _remove(self, block: Block) -> None:
        """Take a block and all below it out of the tree, with their files."""
        if block.gone or block.parent is None:
            return
        del block.parent.children[block.tokens.tobytes()]
        for one in block.subtree():
            one.gone = True
            self._resident.drop(one)
            if self._files is not None:
                self._files.remove(one)

    def _blocks(self) -> list[Block]:
        """All blocks, parents first."""
        return list(self._tree.subtree())[1:]

    def flush(self) -> None:
        """Write what has no file yet, and wait until it is written."""
        if self._files is not None:
            with self._lock:
                self._files.save(self._blocks(), wait=True)
            self._files.flush()

    def close(self) -> None:
        """Write what has no file yet, and let other processes have the folder."""
        self.flush()
        if self._files is not None:
            self._files.close()
            self._files = None
        with self._lock:
            for block in list(self._tree.children.values()):
                self._remove(block)

    def __enter__(self) -> PromptStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """How much there is, and how often it served, JSON-ready."""
        with self._lock:
            blocks = self._blocks()
            return asdict(self._counts) | {
                "prompts": sum(not block.children for block in blocks),
                "blocks": len(blocks),
                "tokens": sum(len(block.tokens) for block in blocks),
                "bytes": self.nbytes,
                "limit_bytes": self.limit_bytes,
                "disk": None if self._files is None else self._files.describe(),
            }
