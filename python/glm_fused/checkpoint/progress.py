"""Shows how much of something has been read or written, where stderr is a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def byte_bar(what: str, total: int) -> tqdm[Any]:
    """A bar of bytes on a terminal, and nothing elsewhere."""
    return tqdm(
        total=total,
        desc=what,
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
        leave=False,
    )
