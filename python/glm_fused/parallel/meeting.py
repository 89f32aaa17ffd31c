"""Ends a rank that waits for others to be there, before they watch one another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .. import _ext

LIMIT = 120.0  # seconds; the others may be started by ssh, and read Python from a slow disk
_FAILED = 2  # the exit code, as the command line has it


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """All ranks come to the end of the block within `LIMIT`, or the process ends.

    MLX waits there for ever, holds Python's lock, and lets no signal in.
    """
    words = f"glm-fused: error: [shard] other ranks did not come within {LIMIT:g} s: expected all"
    deadline = _ext.Deadline(LIMIT, f"{words} to be started by then, and to go on.", _FAILED)
    try:
        yield
    finally:
        deadline.lift()
