"""Which path the ops take: fused, or the reference that it must equal bit for bit."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator

from ..environment import debug, flag

_fallen_back: set[str] = set()
VARIABLE = "GLM_FUSED_REFERENCE"  # of the environment
override: contextvars.ContextVar[bool | None] = contextvars.ContextVar("reference", default=None)


def use_reference(keyword: bool | None = None) -> bool:
    """Whether to take the reference path.

    The keyword says so, or else the context manager around it, or else the environment.
    """
    if keyword is not None:
        return keyword
    asked = override.get()
    return flag(VARIABLE) if asked is None else asked


@contextlib.contextmanager
def reference_path(enabled: bool = True) -> Iterator[None]:
    """Within the block, build graphs on the reference path (or, with False, on the fused one).

    It holds for the thread that enters it, goes before ``GLM_FUSED_REFERENCE``, and raises nothing
    of its own; what was asked for before it holds again after it.
    """
    token = override.set(enabled)
    try:
        yield
    finally:
        override.reset(token)


def fall_back(op: str, obstacle: str) -> None:
    """Say that `op` runs without its Metal kernels: once as a warning, always when debugging."""
    debug("%s: no Metal kernel, %s", op, obstacle)
    if op not in _fallen_back:
        _fallen_back.add(op)
        warnings.warn(
            f"{op} runs without its Metal kernels: {obstacle}", RuntimeWarning, stacklevel=3
        )
