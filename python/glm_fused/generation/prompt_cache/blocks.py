"""A tree of blocks of tokens: texts that begin alike share the blocks that they have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .rows import Rows


@dataclass(eq=False)
class Block:
    """A run of tokens after those of its parents, with the rows that caches have of them.

    All but the last blocks of texts have the same number of tokens; only these have children.

    Attributes:
        id: a digest of the tokens up to the block's end, and of what they are tokens of.
        parent: the block before it; None for the root, which has no tokens.
        tokens: uint32 [n].
        rows: those in memory, if they are there.
        file_bytes: the size of its file; 0 where it has none.
        queued: whether its file is about to be written; its rows stay in memory until then.
        gone: whether it is in the tree no more.
    """

    id: str
    parent: Block | None
    tokens: np.ndarray
    rows: Rows | None = None
    file_bytes: int = 0
    queued: bool = False
    gone: bool = False
    children: dict[bytes, Block] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in memory besides the tree itself."""
        return self.tokens.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def subtree(self) -> Iterator[Block]:
        """The block and all below it, parents before their children."""
        waiting = [self]
        while waiting:
            block = waiting.pop()
            yield block
            waiting.extend(block.children.values())


class Match(NamedTuple):
    """A block, and how many of its first tokens are a text's."""

    block: Block
    tokens: int


def root(identity: str) -> Block:
    """The tree of no text yet; ``identity`` says what rows are of: model, format and so on."""
    return Block(hashlib.sha256(identity.encode()).hexdigest(), None, np.zeros(0, np.uint32))


def block_id(parent_id: str, tokens: np.ndarray) -> str:
    """The id of the block with these tokens below a parent."""
    return hashlib.sha256(parent_id.encode() + tokens.astype("<u4").tobytes()).hexdigest()


def child(parent: Block, tokens: np.ndarray) -> Block | None:
    """The block below a parent that has these tokens, or these and more."""
    found = parent.children.get(tokens.tobytes())
    if found is not None:
        return found
    below = parent.children.values()
    return next((block for block in below if common(block.tokens, tokens) == len(tokens)), None)


def add_child(parent: Block, tokens: np.ndarray) -> Block:
    """A new block below a parent, which has none with these tokens."""
    block = Block(block_id(parent.id, tokens), parent, tokens)
    parent.children[tokens.tobytes()] = block
    return block


def prefixes(parent: Block, tokens: np.ndarray) -> list[Block]:
    """The blocks below a parent whose tokens are some of the first of ``tokens``, but not all."""
    return [
        block
        for block in parent.children.values()
        if len(block.tokens) < len(tokens) and common(block.tokens, tokens) == len(block.tokens)
    ]


def find(tree: Block, tokens: np.ndarray, size: int) -> list[Match]:
    """The blocks, of ``size`` tokens each but the last, with as many of the tokens as there are."""
    matches: list[Match] = []
    block, done = tree, 0
    while done < len(tokens):
        rest = tokens[done : done + size]
        below = block.children.get(rest.tobytes())
        if below is None:
            some = [Match(b, common(b.tokens, rest)) for b in block.children.values()]
            best = max(some, key=_preference, default=None)
            return [*matches, best] if best is not None and best.tokens else matches
        matches.append(Match(below, len(rest)))
        block, done = below, done + len(rest)
    return matches


def _preference(match: Match) -> tuple[int, bool]:
    """The more tokens the better, and rather from memory than from a file."""
    return match.tokens, match.block.rows is not None


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens are the same in both."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def as_tokens(tokens: Sequence[int]) -> np.ndarray:
    """Tokens as uint32 [n]."""
    return np.asarray(tokens, np.uint32).reshape(-1)
