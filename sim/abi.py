"""Calls the executor's C interface (runtime/executor.h) by ctypes."""

from __future__ import annotations

import ctypes as c
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .compiler import executor
from .kernels import Argument, FunctionConstant
from .report import Finding, Report, Traffic

_KINDS = ("buffer", "threadgroup", "position")
_FINDINGS = ("race", "out of bounds", "uninitialised", "divergence", "misaligned")
_LISTS = ("races", "out_of_bounds", "uninitialised", "divergence", "misaligned")


class _Argument(c.Structure):
    _fields_ = [
        *((n, c.c_int32) for n in ("kind", "index", "writable", "reference")),
        *((n, c.c_char_p) for n in ("name", "type", "space")),
    ]


class _Kernel(c.Structure):
    _fields_ = [
        ("name", c.c_char_p),
        ("entry", c.c_void_p),
        ("arguments", c.POINTER(_Argument)),
        ("argument_count", c.c_uint32),
        ("most_threads", c.c_void_p),
    ]


class _FunctionConstant(c.Structure):
    _fields_ = [
        ("name", c.c_char_p),
        ("type", c.c_char_p),
        ("index", c.c_int32),
        ("size", c.c_uint32),
        ("storage", c.c_void_p),
    ]


class _Contents(c.Structure):
    _fields_ = [
        ("kernels", c.POINTER(_Kernel)),
        ("constants", c.POINTER(_FunctionConstant)),
        *((n, c.c_uint32) for n in ("kernel_count", "constant_count", "traced")),
    ]


class _Constant(c.Structure):
    _fields_ = [
        ("index", c.c_int32),
        ("name", c.c_char_p),
        ("value", c.c_void_p),
        ("size", c.c_size_t),
    ]


class _Buffer(c.Structure):
    _fields_ = [
        ("index", c.c_int32),
        ("data", c.c_void_p),
        ("size", c.c_uint64),
        ("phase", c.c_uint32),
    ]


class _Dispatch(c.Structure):
    _fields_ = [
        ("groups", c.c_uint32 * 3),
        ("group", c.c_uint32 * 3),
        ("threads", c.c_uint32),
        ("buffers", c.POINTER(_Buffer)),
        ("buffer_count", c.c_uint32),
        ("threadgroup_memory", c.POINTER(_Buffer)),
        ("threadgroup_memory_count", c.c_uint32),
        ("seed", c.c_uint64),
        ("workers", c.c_uint32),
        ("in_place", c.c_uint32),
    ]


class _Finding(c.Structure):
    _fields_ = [
        ("kind", c.c_int32),
        ("buffer", c.c_int32),
        ("offset", c.c_int64),
        ("count", c.c_uint64),
        *((n, c.c_uint32) for n in ("threadgroup", "thread", "other_threadgroup", "other_thread")),
        ("file", c.c_char_p),
        ("line", c.c_uint32),
        ("other_file", c.c_char_p),
        ("other_line", c.c_uint32),
        ("text", c.c_char_p),
    ]


class _Traffic(c.Structure):
    _fields_ = [
        ("buffer", c.c_int32),
        *((n, c.c_uint64) for n in ("read", "written", "unique_read", "unique_written")),
    ]


class _Counts(c.Structure):
    _fields_ = [
        *(
            (n, c.c_uint64)
            for n in ("threadgroups", "threads", "simd_functions", "barriers", "threadgroup_bytes")
        ),
        *((n, c.c_uint64) for n in ("threadgroup_read", "threadgroup_written")),
        ("seconds", c.c_double),
    ]


@functools.cache
def _executor() -> c.CDLL:
    # RTLD_GLOBAL, because the shader libraries need its symbols.
    lib = c.CDLL(str(executor()), mode=c.RTLD_GLOBAL)
    p, text = c.c_void_p, c.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "sim_open": (p, [text, text, c.c_size_t]),
        "sim_library_contents": (c.POINTER(_Contents), [p]),
        "sim_specialize": (p, [p, text, c.POINTER(_Constant), c.c_size_t, text, c.c_size_t]),
        "sim_launch": (p, [p, c.POINTER(_Dispatch)]),
        "sim_report_error": (text, [p]),
        "sim_report_findings": (c.POINTER(_Finding), [p, c.POINTER(c.c_size_t)]),
        "sim_report_traffic": (c.POINTER(_Traffic), [p, c.POINTER(c.c_size_t)]),
        "sim_report_counts": (c.POINTER(_Counts), [p]),
        "sim_report_free": (None, [p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def open_library(path: Path) -> int:
    """A handle of a shader library; raises OSError, which says why, if it does not load."""
    error = c.create_string_buffer(1024)
    handle = _executor().sim_open(str(path).encode(), error, len(error))
    if not handle:
        raise OSError(error.value.decode())
    return int(handle)


def contents(handle: int) -> Any:
    """The library's `sim_contents`, a structure of its kernels and constants."""
    return _executor().sim_library_contents(handle).contents


def arguments(kernel: Any) -> tuple[Argument, ...]:
    """The arguments of a kernel in a library's contents."""
    return tuple(
        Argument(
            _KINDS[a.kind],
            a.index,
            a.name.decode(),
            a.type.decode(),
            a.space.decode(),
            bool(a.writable),
            bool(a.reference),
        )
        for a in kernel.arguments[: kernel.argument_count]
    )


def specialize(
    handle: int, name: str, values: Sequence[tuple[FunctionConstant, npt.NDArray[Any]]]
) -> int:
    """A handle of a kernel with values of its function constants; ValueError says what is wrong."""
    table = (_Constant * len(values))(
        *(_Constant(k.index, k.name.encode(), v.ctypes.data, v.nbytes) for k, v in values)
    )
    error = c.create_string_buffer(1024)
    pipeline = _executor().sim_specialize(
        handle, name.encode(), table, len(values), error, len(error)
    )
    if not pipeline:
        raise ValueError(error.value.decode())
    return int(pipeline)


class Dispatch:
    """A sim_dispatch and the tables it points to."""

    def __init__(
        self,
        groups: tuple[int, int, int],
        group: tuple[int, int, int],
        buffers: Mapping[int, npt.NDArray[Any]],
        threadgroup_memory: Mapping[int, int],
        **settings: int,
    ) -> None:
        self._bound = (_Buffer * len(buffers))(
            *(_Buffer(i, a.ctypes.data, a.nbytes, a.ctypes.data % 16) for i, a in buffers.items())
        )
        self._memory = (_Buffer * len(threadgroup_memory))(
            *(_Buffer(i, None, size, 0) for i, size in threadgroup_memory.items())
        )
        self.c = _Dispatch(groups=groups, group=group, **settings)
        self.c.buffers, self.c.buffer_count = self._bound, len(buffers)
        self.c.threadgroup_memory = self._memory
        self.c.threadgroup_memory_count = len(threadgroup_memory)


def launch(pipeline: int, dispatch: Dispatch, name: str) -> tuple[str, Report]:
    """Run a kernel; returns why it failed, or "", and its report."""
    lib = _executor()
    handle = lib.sim_launch(pipeline, c.byref(dispatch.c))
    error = lib.sim_report_error(handle)
    return (error or b"").decode(), take_report(handle, name)


def take_report(handle: int, name: str) -> Report:
    """The report that a sim_report* points to; the pointer is freed."""
    lib = _executor()
    try:
        return _report(lib, handle, name)
    finally:
        lib.sim_report_free(handle)


def _report(lib: c.CDLL, handle: int, name: str) -> Report:
    report = Report(name)
    count = c.c_size_t()
    findings = lib.sim_report_findings(handle, c.byref(count))
    for f in findings[: count.value]:
        getattr(report, _LISTS[f.kind]).append(_finding(f))
    traffic = lib.sim_report_traffic(handle, c.byref(count))
    for t in traffic[: count.value]:
        report.traffic[t.buffer] = Traffic(t.read, t.written, t.unique_read, t.unique_written)
    counts = lib.sim_report_counts(handle).contents
    for field in _Counts._fields_:
        setattr(report, field[0], getattr(counts, field[0]))
    return report


def _finding(f: Any) -> Finding:
    return Finding(
        _FINDINGS[f.kind],
        f.file.decode(),
        f.line,
        {-1: "threadgroup", -2: None}.get(f.buffer, f.buffer),
        f.offset,
        (f.threadgroup, f.thread),
        f.other_file.decode(),
        f.other_line,
        (f.other_threadgroup, f.other_thread),
        f.count,
        f.text.decode(),
    )
