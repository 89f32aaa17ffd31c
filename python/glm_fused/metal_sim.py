"""Metal kernels on Linux: the simulator in a build made for tests.

A build with ``-C cmake.define.GLM_FUSED_METAL_SIM=ON`` holds the Metal host code and knows the
source tree it was made from, whose ``sim`` package compiles and runs the shaders.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx

from . import _ext

Size = tuple[int, int, int]
_simulator: Any = getattr(_ext, "_simulator", None)
_depth = 0


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: `groups` threadgroups of `threadgroup` threads, and what was seen.

    `report` is the simulator's: with tracing its findings and the traffic of every buffer.
    """

    kernel: str
    groups: Size
    threadgroup: Size
    report: Any


def unavailable() -> str:
    """Why this build cannot simulate Metal, or "" if it can."""
    if _simulator is None:
        return (
            "this build has no Metal simulator; "
            "install with -C cmake.define.GLM_FUSED_METAL_SIM=ON from a source tree"
        )
    if not (Path(_simulator.source_dir) / "sim" / "__init__.py").is_file():
        return f"the source tree {_simulator.source_dir} that this was built from is gone"
    return ""


def active() -> bool:
    """Whether ops with a Metal kernel run it in the simulator now."""
    return _depth > 0


@contextlib.contextmanager
def simulated(*, contract: bool = True, trace: bool = False) -> Iterator[None]:
    """Run `moe_decode` and `router_topk` as on a GPU, their shaders in the simulator.

    Applies to graphs built inside; evaluate them inside too. Every other op stays on the CPU.

    Args:
        contract: let the shader compiler fuse ``a*b+c``, as the CPU kernels do.
        trace: report races, stray reads and traffic of every launch; far slower.

    Raises:
        RuntimeError: this build has no simulator.
    """
    global _depth
    reason = unavailable()
    if reason:
        raise RuntimeError(reason)
    _simulator.load_executor(str(_sim("compiler").executor()))
    variant = f"contract={contract} trace={trace}"
    _simulator.configure(variant, _compiler(contract, trace), os.cpu_count() or 1)
    _depth += 1
    try:
        yield
        mx.synchronize()
    finally:
        _depth -= 1


def take_launches() -> list[Launch]:
    """The launches since the last call, in order."""
    take_report = _sim("abi").take_report
    return [
        Launch(kernel, groups, group, take_report(report, kernel))
        for kernel, groups, group, report in _simulator.take_launches()
    ]


def _compiler(contract: bool, trace: bool) -> Callable[[str, str], str]:
    compile_library = _sim("compiler").compile_library

    def compile_shader(name: str, text: str) -> str:
        return str(compile_library(text, contract=contract, trace=trace))

    return compile_shader


def _sim(module: str) -> ModuleType:
    """A module of the source tree's ``sim`` package."""
    if "sim" not in sys.modules:
        sys.path.insert(0, _simulator.source_dir)
        try:
            importlib.import_module("sim")
        finally:
            sys.path.pop(0)
    return importlib.import_module(f"sim.{module}")
