"""The machine and the versions a report is about, and nothing that tells whose machine it is."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import _ext
from ..environment import VARIABLES

PACKAGES = ("glm-fused", "mlx", "mlx-lm", "numpy")


def machine() -> dict[str, Any]:
    """The machine, JSON-ready; what the system does not tell is None."""
    return {
        "chip": chip(),
        "cpu_cores": os.cpu_count(),
        "performance_cores": _integer("sysctl", "-n", "hw.perflevel0.physicalcpu"),
        "gpu": _gpu(),
        "gpu_cores": _gpu_cores(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "os": platform.platform(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cpu_kernels": _ext.cpu_kernels(),
        "threads": _ext.num_threads(),
    }


def versions() -> dict[str, str]:
    """The versions of the packages, and of those that the extension was built with."""
    built = {"built with mlx": _ext.built_with_mlx, "built with nanobind": _ext.built_with_nanobind}
    return {name: metadata.version(name) for name in PACKAGES} | built


def environment() -> dict[str, str]:
    """This package's environment variables that are set, their values without paths."""
    return {name: without_paths(os.environ[name]) for name in VARIABLES if name in os.environ}


def chip() -> str:
    """The processor's name as its maker spells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        return names[0] if names else platform.machine()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()


def without_paths(text: str) -> str:
    """`text` with each file path cut to its last part."""
    return re.sub(r"(?<![\w<])~?(?:/[^\s/:'\"]+)+/(?=[^\s/])", "", text)


def _gpu() -> dict[str, Any] | None:
    if not mx.metal.is_available():
        return None
    info = mx.device_info(mx.Device(mx.gpu))
    kept = ("device_name", "architecture", "memory_size", "max_recommended_working_set_size")
    return {key: info[key] for key in kept if key in info}


def _gpu_cores() -> int | None:
    found = re.search(r'"gpu-core-count"\s*=\s*(\d+)', _output("ioreg", "-rc", "AGXAccelerator"))
    return int(found[1]) if found else None


def _integer(*command: str) -> int | None:
    text = _output(*command)
    return int(text) if text.isdecimal() else None


def _output(*command: str) -> str:
    """What a macOS tool prints; "" on other systems."""
    if platform.system() != "Darwin":
        return ""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
