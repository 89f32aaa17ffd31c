"""What a Mach-O binary for arm64 needs and offers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import lief

Binary = lief.MachO.Binary

lief.logging.disable()  # else it reports empty tables, which are no fault, on standard error

# By <mach-o/loader.h>, ordinals from here on mean "look everywhere" and no library.
_FIRST_SPECIAL_ORDINAL = 0xFD


@cache
def parse(path: Path) -> Binary:
    fat = lief.MachO.parse(path)
    binary = fat.take(lief.MachO.Header.CPU_TYPE.ARM64) if fat else None
    if binary is None:
        raise ValueError(f"{path} is no Mach-O file for arm64")
    return binary


def libraries(binary: Binary) -> list[str]:
    """The install names of the libraries that a binary loads, in the order of their ordinals."""
    own_name = lief.MachO.LoadCommand.TYPE.ID_DYLIB
    return [str(library.name) for library in binary.libraries if library.command != own_name]


def undefined(binary: Binary) -> dict[str, str | None]:
    """Every undefined symbol and the library that it is bound to, or None where there is none."""
    loaded = libraries(binary)
    bound: dict[str, str | None] = {}
    for symbol in binary.imported_symbols:
        ordinal = (symbol.description >> 8) & 0xFF
        named = 0 < ordinal < _FIRST_SPECIAL_ORDINAL
        bound[str(symbol.name)] = loaded[ordinal - 1] if named else None
    return bound


def exported(binary: Binary) -> frozenset[str]:
    return frozenset(str(symbol.name) for symbol in binary.exported_symbols)
