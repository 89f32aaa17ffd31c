"""Builds the wheel for a Mac: the project's own back end and CMakeLists.txt cross-compile it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from . import mlx_wheels, sdk, zig
from .errors import MacOSBuildError

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent

BUILD_WHEEL = """
import json, sys
from scikit_build_core.build import build_wheel
build_wheel(sys.argv[1], json.loads(sys.argv[2]))
"""


def pinned_mlx() -> str:
    """The version of mlx that pyproject.toml pins for macOS."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    (version,) = set(re.findall(r"\"mlx==([\d.]+); sys_platform == 'darwin'\"", text))
    return str(version)


def work_dir() -> Path:
    return REPOSITORY / "build" / "macos"


def cmake_dir() -> Path:
    return work_dir() / "cmake"


def build_wheel(mlx: Path, to: Path) -> Path:
    """Compile, link and pack the wheel into `to`; warnings are errors.

    Raises:
        MacOSBuildError: the build failed; the message has what compiler and linker said.
    """
    sdk.make(mlx, work_dir() / "sdk")
    to.mkdir(parents=True, exist_ok=True)
    # It is linked anew each time, as ninja does not know of the stubs that the link reads.
    for old in [*to.glob("*.whl"), *cmake_dir().glob("_ext*.so")]:
        old.unlink()
    run = subprocess.run(
        [sys.executable, "-c", BUILD_WHEEL, to, json.dumps(_settings(mlx))],
        cwd=REPOSITORY,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if run.returncode != 0:
        raise MacOSBuildError(f"the extension does not build for macOS:\n{run.stdout}")
    (wheel,) = to.glob("*.whl")
    return wheel


def environment() -> dict[str, str]:
    """The environment that bin/ and the build back end read."""
    python = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    caches = str(mlx_wheels.cache_dir() / "zig")
    return {
        **os.environ,
        "GLM_FUSED_ZIG": str(zig.executable()),
        "GLM_FUSED_MACOS_SDK": str(work_dir() / "sdk"),
        "ZIG_GLOBAL_CACHE_DIR": caches,
        "ZIG_LOCAL_CACHE_DIR": caches,
        "_PYTHON_HOST_PLATFORM": "macosx-14.0-arm64",
        "SETUPTOOLS_EXT_SUFFIX": f".{python}-darwin.so",
    }


def _settings(mlx: Path) -> dict[str, object]:
    built = work_dir() / "sdk"
    flags = [
        f"-isystem {HERE / 'headers'}",
        # Apple's compiler does the same; the macros allow only what libc++ of macOS 14 has.
        "-fno-sized-deallocation",
        "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS",
        "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
    ]
    defines = {
        "CMAKE_TOOLCHAIN_FILE": HERE / "toolchain.cmake",
        "CMAKE_CXX_FLAGS": " ".join(flags),
        "CMAKE_MODULE_LINKER_FLAGS": f"-F{built / 'frameworks'}",
        "CMAKE_COMPILE_WARNING_AS_ERROR": "ON",
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "MLX_DIR": mlx / "mlx/share/cmake/MLX",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": built / "python",
        "Python_SOABI": sysconfig.get_config_var("SOABI"),
    }
    return {
        "build-dir": str(cmake_dir()),
        "cmake.python-hints": "false",
        "cmake.args": [f"-D{name}={value}" for name, value in defines.items()],
    }
