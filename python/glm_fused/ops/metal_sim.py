"""Runs Metal kernels on Linux, by the simulator in a build made for tests.

A build with ``-C cmake.define.GLM_FUSED_METAL_SIM=ON`` holds the Metal host code and, as
``_ext._simulator``, a hook that leads to the simulator of the source tree that it was made from.
The package knows the hook alone: `obstacle()` says why there is no simulator, `host()` gives it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import mlx.core as mx

from .. import _ext

_hook: Any = getattr(_ext, "_simulator", None)
_depth = 0


class Launch(Protocol):
    """A kernel's launch: `groups` threadgroups of `threadgroup` threads.

    `report` is the simulator's: its findings and the traffic of every buffer, if it traces.
    """

    kernel: str
    groups: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    report: Any


class Simulator(Protocol):
    """The interface of what the hook's `host()` gives."""

    def simulated(self, **settings: Any) -> AbstractContextManager[None]:
        """Within the block, the simulator runs the launches, with settings of its own."""

    def take_launches(self) -> list[Any]:
        """The launches since the last call, in order."""

    def take_waits(self) -> int:
        """How often the host has waited for the GPU since the last call, within ops."""

    def stock_launches(self, *outputs: mx.array) -> list[str]:
        """Evaluate the arrays; the primitives of MLX that a GPU runs kernels for."""


def unavailable() -> str:
    """Why this build cannot simulate Metal, or "" if it can."""
    if _hook is None:
        return (
            "this build has no Metal simulator; "
            "install with -C cmake.define.GLM_FUSED_METAL_SIM=ON from a source tree"
        )
    return str(_hook.obstacle())


def active() -> bool:
    """Whether ops with a Metal kernel run it in the simulator now."""
    return _depth > 0


@contextlib.contextmanager
def simulated(**settings: Any) -> Iterator[None]:
    """Within the block, ops that have Metal kernels run them in the simulator.

    It applies to graphs built inside; evaluate them inside too. Every other op stays on the CPU.

    Args:
        settings: the simulator's, such as ``contract`` (whether the shader compiler fuses
            ``a*b+c``, as the CPU kernels do; True unless given) and ``trace`` (report races, stray
            reads and traffic of every launch; far slower).

    Raises:
        RuntimeError: this build has no simulator.
        TypeError: the simulator has no such setting.
    """
    global _depth
    with _simulator().simulated(**settings):
        _depth += 1
        try:
            yield
            mx.synchronize()
        finally:
            _depth -= 1


def take_launches() -> list[Launch]:
    """The launches since the last call, in order.

    Raises:
        RuntimeError: this build has no simulator.
    """
    return _simulator().take_launches()


def take_waits() -> int:
    """How often the host has waited for the GPU since the last call, within ops.

    Raises:
        RuntimeError: this build has no simulator.
    """
    return _simulator().take_waits()


def stock_launches(*outputs: mx.array) -> list[str]:
    """Evaluate the arrays; the primitives of MLX in their graph that a GPU runs kernels for.

    Raises:
        RuntimeError: this build has no simulator.
    """
    return _simulator().stock_launches(*outputs)


@functools.cache
def _simulator() -> Simulator:
    if reason := unavailable():
        raise RuntimeError(reason)
    simulator: Simulator = _hook.host()
    return simulator
