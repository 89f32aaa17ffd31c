"""Build results, by a key of everything they were made from."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def directory() -> Path:
    """GLM_FUSED_SIM_CACHE, or ~/.cache/glm-fused-sim."""
    named = os.environ.get("GLM_FUSED_SIM_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "glm-fused-sim"


def key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.encode())
    return digest.hexdigest()[:32]


def cached(name: str, build: Callable[[Path], Path]) -> Path:
    """The file `name` of the cache; when absent, what build(scratch directory) makes.

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
