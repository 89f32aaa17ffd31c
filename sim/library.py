"""Compiled shaders and their kernels, run on numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import abi
from .compiler import compile_library
from .kernels import Argument, FunctionConstant
from .report import Report

Size = tuple[int, int, int]
_CONSTANT_TYPES = {
    **{"bool": np.bool_, "half": np.float16, "float": np.float32},
    **{"char": np.int8, "short": np.int16, "int": np.int32, "long": np.int64},
    **{"uchar": np.uint8, "ushort": np.uint16, "uint": np.uint32, "ulong": np.uint64},
}


class LaunchError(RuntimeError):
    """A kernel could not run to its end; `report` holds what was found until then."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Kernel:
    """A kernel by its host name; `arguments` are in the order in which the shader declares them."""

    name: str
    arguments: tuple[Argument, ...]


def compile(
    source: str | Path,
    *,
    include_dirs: Sequence[str | Path] = (),
    defines: Mapping[str, str] | None = None,
    contract: bool = False,
    trace: bool = False,
) -> Library:
    """Compile Metal source, which is the text itself as a str or a file as a Path.

    `contract` lets the compiler fuse a*b+c within an expression; other fast math is off either way.
    A library compiled with `trace` reports races, stray and uninitialised accesses and traffic
    of every launch, at a hundredth of the speed. Raises CompileError with the compiler's
    diagnostics."""
    return Library(compile_library(source, include_dirs, defines, contract, trace))


class Library:
    """A compiled shader; `path` is its shared object in the cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = abi.open_library(path)
        contents = abi.contents(self._handle)
        self.traced = bool(contents.traced)
        self.kernels = {
            k.name.decode(): Kernel(k.name.decode(), abi.arguments(k))
            for k in contents.kernels[: contents.kernel_count]
        }
        self.constants = tuple(
            FunctionConstant(c.name.decode(), c.type.decode(), c.index)
            for c in contents.constants[: contents.constant_count]
        )

    def run(
        self,
        name: str,
        *,
        grid: Size,
        threadgroup: Size,
        buffers: Mapping[int, npt.NDArray[Any]],
        constants: Mapping[int | str, Any] | None = None,
        threadgroup_memory: Mapping[int, int] | None = None,
        grid_in_threads: bool = False,
        seed: int | None = None,
        threads: int = 1,
        in_place: bool = False,
    ) -> Report:
        """Run a kernel on arrays, by buffer index; what it writes is in them afterwards.

        `grid` counts threadgroups, or threads with `grid_in_threads`; `threadgroup` counts threads.
        `constants` are function constants by index or name; those left out are zero.
        `threadgroup_memory` has bytes by index. With a `seed` threads run in a pseudo-random order
        instead of the fixed one. `threads` is how many OS threads share the threadgroups; a traced
        library uses one. With `in_place` the kernel runs on the arrays themselves, without copies
        that end at guard pages.

        Raises KeyError for an unknown kernel, ValueError for an array that cannot be bound and
        LaunchError when the kernel fails, e.g. by an access outside its buffers."""
        if name not in self.kernels:
            raise KeyError(f"no kernel {name!r}; there are: {', '.join(self.kernels)}")
        self._check_buffers(self.kernels[name], buffers)
        pipeline = abi.specialize(self._handle, name, self._constant_values(constants or {}))
        dispatch = abi.Dispatch(
            grid,
            threadgroup,
            buffers,
            threadgroup_memory or {},
            threads=grid_in_threads,
            seed=0 if seed is None else seed + 1,
            workers=threads,
            in_place=in_place,
        )
        error, report = abi.launch(pipeline, dispatch, name)
        if error:
            raise LaunchError(error, report)
        return report

    def _check_buffers(self, kernel: Kernel, buffers: Mapping[int, npt.NDArray[Any]]) -> None:
        known = {a.index: a for a in kernel.arguments if a.kind == "buffer"}
        for index, array in buffers.items():
            if index not in known:
                raise ValueError(f"{kernel.name} has no buffer {index}; it has {sorted(known)}")
            what = f"{kernel.name}: buffer {index} ({known[index].name})"
            if not array.flags.c_contiguous:
                raise ValueError(f"{what} is not contiguous")
            if known[index].writable and not array.flags.writeable:
                raise ValueError(f"{what} is written by the kernel, but the array is read-only")

    def _constant_values(
        self, given: Mapping[int | str, Any]
    ) -> list[tuple[FunctionConstant, npt.NDArray[Any]]]:
        found = []
        for key, value in given.items():
            match = [c for c in self.constants if key in (c.index, c.name)]
            if not match:
                names = ", ".join(f"{c.index} {c.name}" for c in self.constants)
                raise KeyError(f"no function constant {key!r}; there are: {names or 'none'}")
            found.append((match[0], np.array(value, _dtype(match[0].type))))
        return found


def _dtype(name: str) -> npt.DTypeLike:
    return _CONSTANT_TYPES[name] if name in _CONSTANT_TYPES else np.dtype(name.removesuffix("_t"))
