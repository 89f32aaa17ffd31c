"""Times a token with other tiles and other sizes of command buffers, each in a process of its own.

Both are read from the environment when a process begins to use the GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..selftest.backends import Backend

# As GLM_FUSED_METAL_TILES has them: rows, then simdgroups of gate and up, down, router.
TILES = ("4,2,8,8", "4,1,4,8", "4,1,8,8", "8,1,8,8", "2,2,8,8", "4,4,16,8")
# As MLX_MAX_OPS_PER_BUFFER and MLX_MAX_MB_PER_BUFFER have them.
BUFFERS = (("50", "50"), ("200", "2000"), ("1000", "20000"), ("4000", "4000"))
Settings = dict[str, str]


def settings() -> list[Settings]:
    """The variables of each run: first none, then each kind by itself."""
    tiles = [{"GLM_FUSED_METAL_TILES": tile} for tile in TILES]
    names = "MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER"
    return [{}, *tiles, *(dict(zip(names, buffer, strict=True)) for buffer in BUFFERS)]


def sweep(
    backend: Backend,
    size: str,
    step: Callable[[str], None],
    runs: Sequence[Settings] | None = None,
) -> list[dict[str, Any]]:
    """A row for each run: its ``settings``, and what the part "token" says or ``error``.

    Of the CPU, for which none of them is meant, there is one run, without any.
    """
    if runs is None:
        runs = settings() if backend.name == "metal" else [{}]
    rows = []
    for variables in runs:
        step(f"{backend.name}: sweep, {variables or 'as it is'}")
        rows.append({"settings": variables} | _token(backend, size, variables))
    return rows


def _token(backend: Backend, size: str, variables: Settings) -> dict[str, Any]:
    command = [sys.executable, "-m", "glm_fused", "selftest", "--backend", backend.name]
    command += ["--measure", size, "--parts", "token", "--json", "-"]
    run = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if run.returncode:
        return {"error": run.stderr.strip()[-400:] or f"status {run.returncode}"}
    (measured,) = json.loads(run.stdout)["measured"]
    token: dict[str, Any] = measured["token"]
    return token
