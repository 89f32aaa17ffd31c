"""Checks that every undefined symbol of the extension has a library that provides it."""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path

from . import macho, providers
from .errors import MacOSBuildError


def undefined_by_provider(extension: Path, mlx: Path) -> Counter[str]:
    """How many symbols the extension takes from each library.

    Raises:
        MacOSBuildError: it needs a symbol that its provider is not known to have.
    """
    known = providers.all_of(mlx)
    count: Counter[str] = Counter()
    missing = []
    for symbol, library in sorted(macho.undefined(macho.parse(extension)).items()):
        provider = library or providers.PYTHON
        count[provider] += 1
        if symbol not in known.get(provider, ()):
            missing.append(_explain(symbol, library, known[providers.LIBMLX]))
    if missing:
        raise MacOSBuildError(
            f"{extension.name} needs {len(missing)} symbol(s) that nothing it loads on a Mac is "
            "known to provide:\n" + "\n".join(missing)
        )
    return count


def _explain(symbol: str, library: str | None, libmlx: frozenset[str]) -> str:
    name = demangle(symbol)
    lines = [f"  {name}", f"    {symbol}, bound to {library or 'no library'}"]
    scope = name.partition("(")[0]
    near = [d for s in libmlx if scope.split("::")[-1] in s if (d := demangle(s)) != name]
    lines += [f"    libmlx has {d}" for d in sorted(near) if d.partition("(")[0] == scope]
    return "\n".join(lines)


def demangle(symbol: str) -> str:
    """The C++ name of a symbol, or the symbol as it is; Mach-O begins both with an underscore."""
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = function(symbol.removeprefix("_").encode(), None, None, ctypes.byref(status))
    if not text:
        return symbol
    try:
        return ctypes.string_at(text).decode()
    finally:
        ctypes.CDLL(None).free(ctypes.c_void_p(text))
