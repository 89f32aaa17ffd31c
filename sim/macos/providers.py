"""Tells which library of a Mac provides which symbol, from sources that a Linux machine has."""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import nanobind
import yaml

from . import macho, zig

LIBMLX = "@rpath/libmlx.dylib"
LIBSYSTEM = "/usr/lib/libSystem.B.dylib"
LIBCXX = "/usr/lib/libc++.1.dylib"
LIBOBJC = "/usr/lib/libobjc.A.dylib"
FOUNDATION = "/System/Library/Frameworks/Foundation.framework/Versions/C/Foundation"
PYTHON = "Python"

# These symbols of libc++ are not used by MLX. Add a name only with a wheel, for macOS 14 or older,
# that takes it from there.
_ALSO_IN_LIBCXX = {
    "___dynamic_cast",  # duckdb 2.0.0, macOS 11
    "__ZNSt3__19to_stringEd",  # duckdb 2.0.0, macOS 11
    "__ZNSt3__19to_stringEj",  # duckdb 2.0.0, macOS 11
    "__ZNSt3__19to_stringEl",  # sentencepiece 0.2.3, macOS 11
    "__ZNSt3__19to_stringEx",  # duckdb 2.0.0, macOS 11
    "__ZNSt3__19to_stringEy",  # duckdb 2.0.0, macOS 11
}


@cache
def seen_in_mlx(mlx: Path) -> dict[str, frozenset[str]]:
    """The symbols that MLX's binaries, which were linked on a Mac, take from each library.

    This is the only list of Apple's libc++, libobjc and frameworks at hand. It is short, and never
    wrong.
    """
    seen: dict[str, set[str]] = defaultdict(set)
    for path in [*mlx.glob("mlx/lib/*.dylib"), *mlx.glob("mlx/core.*.so")]:
        for symbol, library in macho.undefined(macho.parse(path)).items():
            if library and not library.startswith("@"):
                seen[library].add(symbol)
    seen[LIBCXX] |= _ALSO_IN_LIBCXX
    seen[FOUNDATION] |= seen[LIBOBJC]  # Foundation re-exports libobjc
    return {library: frozenset(symbols) for library, symbols in seen.items()}


@cache
def libsystem() -> frozenset[str]:
    """The symbols of libSystem and what it re-exports, by zig's copy of Apple's libSystem.tbd."""
    tbd = (zig.library() / "libc/darwin/libSystem.tbd").read_text()
    symbols: set[str] = set()
    for document in yaml.load_all(tbd.replace("!tapi-tbd", ""), yaml.CSafeLoader):
        for group in document.get("exports", []) + document.get("reexports", []):
            if any(target.startswith("arm64") for target in group["targets"]):
                symbols.update(group.get("symbols", []), group.get("weak-symbols", []))
    return frozenset(symbols)


@cache
def python_api() -> frozenset[str]:
    """The symbols that nanobind lets an extension leave to the interpreter and this one exports.

    On a Mac the linker gets nanobind's list and refuses any other name.
    """
    names = Path(nanobind.cmake_dir(), "darwin-ld-cpython.sym").read_text().split()
    return frozenset(n for n in names if n != "-U" and hasattr(ctypes.pythonapi, n[1:]))


@cache
def all_of(mlx: Path) -> dict[str, frozenset[str]]:
    """The symbols that each provider is known to have."""
    return {
        **seen_in_mlx(mlx),
        LIBSYSTEM: libsystem(),
        LIBMLX: macho.exported(macho.parse(mlx / "mlx/lib/libmlx.dylib")),
        PYTHON: python_api(),
    }


def describe() -> dict[str, str]:
    """What each provider's list was taken from, for the report."""
    version = ".".join(map(str, sys.version_info[:3]))
    return {
        LIBMLX: "exports of the macOS wheel's libmlx.dylib",
        LIBSYSTEM: "zig's libSystem.tbd",
        PYTHON: f"exports of CPython {version} on Linux, and nanobind's list for macOS",
    }
