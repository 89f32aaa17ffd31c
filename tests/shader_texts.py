"""The shaders as the build embeds them."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import sim

SHADERS = Path(__file__).parent.parent / "metal"


def _load_flatten() -> Any:
    spec = importlib.util.spec_from_file_location("flatten", SHADERS / "flatten.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


flatten = _load_flatten()


@functools.cache
def shader(name: str) -> str:
    """The whole text of a shader."""
    return flatten.flatten(name, sim.mlx_include())


@functools.cache
def mlx_arithmetic() -> str:
    """What the shaders take from MLX."""
    return flatten.mlx_arithmetic(sim.mlx_include())
