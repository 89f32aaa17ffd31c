"""The compiler: zig's clang, from PyPI's ziglang."""

from __future__ import annotations

from pathlib import Path

import ziglang


def executable() -> Path:
    return Path(ziglang.__file__).parent / "zig"


def library() -> Path:
    return Path(ziglang.__file__).parent / "lib"
