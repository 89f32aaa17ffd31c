"""``glm-fused doctor``: what is installed, what this machine can do, and whether it computes right.

It imports what a check needs when the check runs, so that a module that does not load is a check
that fails.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from ..environment import VARIABLES

PACKAGES = ("glm-fused", "mlx", "mlx-lm")
STREAM_BYTES = 256 << 20


def examine(threads: int | None = None) -> dict[str, Any]:
    """Run all checks; returns a JSON-ready dict, whose ``ok`` tells whether every one passed.

    With ``threads``, the number of threads of the CPU kernels is set first.
    """
    versions: dict[str, str | None] = {name: _version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "os": platform.platform()}
    checks = {"packages": _outcome(lambda: _packages(versions))}
    result: dict[str, Any] = {"versions": versions, "environment": _environment()}
    checks["extension"] = _outcome(_extension)
    if checks["extension"]["ok"]:
        checks["cpu"] = _outcome(lambda: _cpu(result, threads))
        checks["fused equals reference"] = _outcome(_self_check)
    result["memory"] = _memory()
    return {"ok": all(check["ok"] for check in checks.values()), "checks": checks} | result


def format_result(result: dict[str, Any]) -> str:
    """The result as text for a terminal."""
    lines = [f"{name:<20}{version or 'missing'}" for name, version in result["versions"].items()]
    if device := result.get("device"):
        metal = "available" if device["metal"] else "not available"
        lines.append(f"{'device':<20}{device['default']}, {device['name']}; Metal {metal}")
    if cpu := result.get("cpu"):
        lines.append(f"{'nanobind':<20}{cpu['nanobind']} (built with)")
        lines.append(f"{'cpu kernels':<20}{cpu['kernels']}, {cpu['threads']} threads")
        huge = cpu["huge_read_gb_per_s"]
        there = "" if huge is None else f", {huge:.1f} GB/s in huge pages"
        lines.append(f"{'read bandwidth':<20}{cpu['read_gb_per_s']:.1f} GB/s{there}")
        lines.append(f"{'huge pages':<20}{_huge_pages(cpu['huge_pages'], huge is not None)}")
    for name, size in result["memory"].items():
        lines.append(f"{'memory, ' + name:<20}{size / 1e9:.1f} GB")
    lines += [f"{name}={value}" for name, value in result["environment"].items()]
    lines.append("")
    for name, check in result["checks"].items():
        lines.append(f"{'ok' if check['ok'] else 'FAILED':<8}{name}: {check['detail']}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _outcome(check: Callable[[], str]) -> dict[str, Any]:
    """A check's detail, or the error that it raised, so that the diagnosis goes on after it."""
    try:
        return {"ok": True, "detail": check()}
    except Exception as error:
        return {"ok": False, "detail": " ".join(str(error).split()) or type(error).__name__}


def _packages(versions: dict[str, str | None]) -> str:
    if missing := [name for name in PACKAGES if versions[name] is None]:
        raise ImportError(f"not installed: {', '.join(missing)}")
    return "installed"


def _extension() -> str:
    from .. import _abi

    _abi.check()
    return "loads, and arrays pass through it"


def _cpu(result: dict[str, Any], threads: int | None) -> str:
    import mlx.core as mx

    from .. import _ext

    if threads is not None:
        _ext.set_num_threads(threads)
    device = mx.default_device()
    result["device"] = {
        "default": "GPU" if device == mx.gpu else "CPU",
        "name": str(mx.device_info(device).get("device_name", "unnamed")),
        "metal": mx.metal.is_available(),
    }
    result["cpu"] = {
        "kernels": _ext.cpu_kernels(),
        "threads": _ext.num_threads(),
        "nanobind": _ext.built_with_nanobind,
        "huge_pages": _ext.huge_page_setting(),
    }
    result["cpu"] |= _read_bandwidths()
    return "kernels chosen, bandwidth measured"


def _read_bandwidths() -> dict[str, float | None]:
    """The GB/s of the best of five reads of memory on all threads, and of such in huge pages."""
    from .. import _ext
    from .benchmark import Yardsticks

    yardsticks = Yardsticks(STREAM_BYTES)

    def best(data: Any) -> float:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            _ext.stream_read(data)
            seconds.append(time.perf_counter() - start)
        return STREAM_BYTES / min(seconds) / 1e9

    huge = best(yardsticks.huge) if yardsticks.moved else None
    return {"read_gb_per_s": best(yardsticks.given), "huge_read_gb_per_s": huge}


def _huge_pages(setting: str, moved: bool) -> str:
    """Whether weights come to lie in them, and why not."""
    if not setting:
        return "none on this system"
    if setting == "never":
        return "never, as the system is set"
    return f"{setting}; weights are moved there" if moved else f"{setting}; none can be had now"


def _self_check() -> str:
    """Compute one small MoE layer on both paths and compare the bits."""
    import mlx.core as mx

    from .. import ops
    from ..formats.weights import FORMATS

    fmt = FORMATS["affine4-g32"]
    key = mx.random.key(1)
    hidden, intermediate, experts = 128, 64, 4

    def weight(*shape: int) -> ops.Weight:
        values = mx.random.normal(shape, mx.bfloat16, key=key)
        return ops.Weight(mx.quantize(values, **fmt.parameters), fmt)

    gate = up = weight(experts, intermediate, hidden)
    down = weight(experts, hidden, intermediate)
    x = mx.random.normal((2, hidden), mx.bfloat16, key=key)
    slots, scores = mx.array([[0, 3], [2, 1]]).astype(mx.int32), mx.array([[0.7, 0.3]] * 2)
    fused, reference = (
        ops.moe_decode(x, gate, up, down, slots, scores, reference=which).view(mx.uint16)
        for which in (False, True)
    )
    if count := (fused != reference).sum().item():
        raise ArithmeticError(f"{count} of {fused.size} values differ in their bits")
    return f"{fused.size} values of a small MoE layer, bit for bit"


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _memory() -> dict[str, int]:
    """The bytes of physical memory, and of free memory where the system tells."""
    sizes = {}
    for name, key in (("total", "SC_PHYS_PAGES"), ("free", "SC_AVPHYS_PAGES")):
        if key in os.sysconf_names:
            sizes[name] = os.sysconf(key) * os.sysconf("SC_PAGE_SIZE")
    return sizes
