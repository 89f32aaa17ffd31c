"""Keeps build results, by a key of everything that they were made from."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def directory() -> Path:
    """The cache's folder: GLM_FUSED_SIM_CACHE, or else ~/.cache/glm-fused-sim."""
    named = os.environ.get("GLM_FUSED_SIM_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "glm-fused-sim"


def key(*parts: str) -> str:
    """A name, of 32 hexadecimal digits, for what was made from `parts`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.encode())
    return digest.hexdigest()[:32]


def cached(name: str, build: Callable[[Path], Path]) -> Path:
    """The file `name` of the cache; where it is absent, `build(scratch directory)` makes it.

    It appears in one step, so that concurrent builders at worst both build."""
    target = directory() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent))
    try:
        os.replace(build(scratch), target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
