"""A build's simulated Metal host, whose `eval_gpu` runs the shaders in the simulator.

The C++ half (host/*.cpp) is part of an extension; `Host` drives it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import abi
from ..compiler import compile_library, executor
from ..report import Report

Size = tuple[int, int, int]
# A compiler gets a library's name and the shader text that the launcher made. It gives the compiled
# library and what precedes the kernels' names in it; None where its kernels are not to be run.
Compiler = Callable[[str, str], tuple[Path, str] | None]


@dataclass(frozen=True)
class Launch:
    """A kernel's launch: `groups` threadgroups of `threadgroup` threads, and what was seen.

    `report` has the findings and the traffic of every buffer if the launch was traced; it is None
    where the kernel was not run. `outputs` are the bytes of the arrays that the kernel writes, by
    buffer index, where they are kept.
    """

    kernel: str
    groups: Size
    threadgroup: Size
    report: Report | None
    outputs: dict[int, bytes]


class Host:
    """The host whose C++ half is `native`."""

    def __init__(self, native: Any) -> None:
        self._native = native

    @contextlib.contextmanager
    def simulated(
        self,
        *,
        contract: bool = True,
        trace: bool = False,
        compiler: Compiler | None = None,
        in_place: bool = False,
        keep_outputs: bool = False,
        architecture: str = "applegpu_g15s",
    ) -> Iterator[None]:
        """Within the block, launches are run with these settings.

        Args:
            contract: let the shader compiler fuse ``a*b+c``, as the CPU kernels do.
            trace: report races, stray reads and traffic of every launch; far slower.
            compiler: makes the libraries, instead of `compiled` with `contract` and `trace`.
            in_place: run on the arrays themselves, without copies that end at guard pages.
            keep_outputs: keep what the launches' output arrays hold after each launch.
            architecture: the GPU's name; Metal calls that of an M5 Max ``applegpu_g17s``.
        """
        library = compiler or functools.partial(compiled, contract=contract, trace=trace)

        def compile_shader(name: str, text: str) -> tuple[str, str]:
            path, prefix = library(name, text) or ("", "")
            return str(path), prefix

        self._native.load_executor(str(executor()))
        self._native.configure(
            compile_shader, os.cpu_count() or 1, in_place, keep_outputs, architecture
        )
        yield

    def take_launches(self) -> list[Launch]:
        """The launches since the last call, in order."""
        return [
            Launch(kernel, groups, group, abi.take_report(report, kernel) if report else None, out)
            for kernel, groups, group, report, out in self._native.take_launches()
        ]

    def take_waits(self) -> int:
        """How many command buffers had the host told of their end, since the last call."""
        waits: int = self._native.take_waits()
        return waits

    def stock_launches(self, *outputs: Any) -> list[str]:
        """Evaluate MLX arrays; the primitives of MLX that a GPU runs kernels for, in any order.

        Views and what keeps its input's memory need none; a concatenation counts once an input. An
        update of a slice counts once, as where its input is not needed any more.
        """
        names: list[str] = self._native.stock_launches(list(outputs))
        return names


@functools.cache
def compiled(name: str, text: str, contract: bool, trace: bool) -> tuple[Path, str]:
    """Compile a launcher's shader text as it is; a `Compiler` once its settings are given.

    Raises:
        CompileError: the compiler refuses the text.
    """
    return compile_library(text, contract=contract, trace=trace), ""
