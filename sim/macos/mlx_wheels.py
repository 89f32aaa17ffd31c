"""Downloads MLX's own macOS wheels once: headers, libmlx.dylib, and its Python extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import MacOSBuildError

PLATFORM = "macosx_14_0_arm64"


def cache_dir() -> Path:
    """The cache's folder: GLM_FUSED_MACOS_CACHE, or else one in the user's cache."""
    if chosen := os.environ.get("GLM_FUSED_MACOS_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "glm-fused" / "macos"


def fetch(version: str) -> Path:
    """The folder with `mlx/`, as site-packages on a Mac would have it.

    Raises:
        MacOSBuildError: the wheels are not cached and cannot be downloaded.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = cache_dir() / f"mlx-{version}-py{python}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        wheels, unpacked = Path(scratch, "wheels"), Path(scratch, "unpacked")
        _download(version, python, wheels)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                # The compiled Metal library, 147 MB, is needed to run and not to link.
                archive.extractall(
                    unpacked, [n for n in archive.namelist() if not n.endswith(".metallib")]
                )
        try:
            unpacked.rename(target)  # it is atomic: another process sees all of it or none
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
            shutil.rmtree(unpacked)
    return target


def _download(version: str, python: str, to: Path) -> None:
    packages = [f"mlx=={version}", f"mlx-metal=={version}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--platform", PLATFORM, "--python-version", python]
    run = subprocess.run(
        [*command, "--dest", to, *packages], text=True, stderr=subprocess.PIPE, check=False
    )
    if run.returncode != 0:
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        raise MacOSBuildError(
            f"cannot download {' and '.join(packages)} for {PLATFORM}, Python {python}: "
            f"{errors[-1].removeprefix('ERROR: ') if errors else run.stderr.strip()}. "
            "The macOS build needs the network once; point GLM_FUSED_MACOS_CACHE at a filled "
            f"cache to do without (now {cache_dir()})."
        )
