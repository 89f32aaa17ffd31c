"""Makes the parts of a macOS SDK that zig lacks: stubs of libraries to link, Python's headers."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from . import macho, providers

_STUB = """--- !tapi-tbd
tbd-version: 4
targets: [ arm64-macos ]
install-name: '{name}'
exports:
  - targets: [ arm64-macos ]
    symbols: [ {symbols} ]
...
"""


def make(mlx: Path, sdk: Path) -> None:
    """Write stubs of every library that MLX loads, with the symbols that MLX takes from it."""
    seen = providers.seen_in_mlx(mlx)
    loaded = macho.libraries(macho.parse(mlx / "mlx/lib/libmlx.dylib"))
    for name in loaded:
        path = _stub_path(sdk, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        symbols = ", ".join(sorted(seen.get(name, ())))
        path.write_text(_STUB.format(name=name, symbols=symbols))
    _copy_python_headers(sdk / "python")


def _stub_path(sdk: Path, install_name: str) -> Path:
    """Where a library's stub goes, such as Foundation.framework/Foundation.tbd, libc++.1.tbd."""
    path = Path(install_name)
    if install_name.startswith("/System/Library/Frameworks/"):
        return sdk / "frameworks" / path.parts[4] / f"{path.name}.tbd"
    return sdk / f"{path.stem}.tbd"


def _copy_python_headers(to: Path) -> None:
    """Copy this Python's headers; pymacconfig.h, which they include, corrects sizes for a Mac.

    Debian's pyconfig.h only selects a file by platform and knows no Mac, so it is replaced by the
    file for this machine.
    """
    include = Path(sysconfig.get_path("include"))
    shutil.copytree(include, to, dirs_exist_ok=True)
    multiarch = sysconfig.get_config_var("MULTIARCH")
    for_here = include.parent / str(multiarch) / include.name / "pyconfig.h"
    if for_here.is_file():
        shutil.copy2(for_here, to / "pyconfig.h")
