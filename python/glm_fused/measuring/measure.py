"""Measures a machine part by part; what fails in one part leaves the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _ext
from ..selftest.backends import Backend
from ..selftest.machine import without_paths
from . import experts, steps
from .subject import SIZES, Subject, on
from .sweep import sweep

PARTS = ("bandwidth", "stages", "layers", "token", "prompts", "streaming", "last_slot", "sweep")
OnStep = Callable[[str], None]


def measure(
    backend: Backend, size: str, memory: int, parts: tuple[str, ...], step: OnStep
) -> dict[str, Any]:
    """What the machine does on one backend, JSON-ready.

    Args:
        backend: where; in the simulator times say nothing.
        size: one of `SIZES`.
        memory: bytes that the machine has, which says how many experts a layer has.
        parts: of `PARTS`.
        step: called with the name of each part as it begins.

    Returns:
        ``backend``, ``size``, ``experts`` of a layer, a value for each part, which is
        ``{"error": …}`` for one that failed, and ``kernels``: of each that was compiled its
        ``most_threads``, the ``threadgroup_bytes`` of its own, and ``seconds`` of compiling.
    """
    chosen = SIZES[size]
    count = chosen.experts_in(memory)
    made: list[Subject] = []

    def subject() -> Subject:
        if not made:
            made.append(Subject(chosen, count))
        return made[0]

    runs: dict[str, Callable[[], Any]] = {
        "bandwidth": lambda: experts.bandwidth(chosen),
        "stages": lambda: steps.stage_rows(subject()),
        "layers": lambda: steps.layer_rows(subject()),
        "token": lambda: steps.token_row(subject()),
        "prompts": lambda: steps.prompt_rows(subject()),
        "streaming": lambda: experts.streaming(chosen),
        "last_slot": lambda: experts.last_slot(chosen),
        "sweep": lambda: sweep(backend, size, step),
    }
    result: dict[str, Any] = {"backend": backend.name, "size": size, "experts": count}
    for part in parts:
        step(f"{backend.name}: {part}")
        if part == "sweep":
            made.clear()  # other processes need the memory
        with on(backend):
            result[part] = _guarded(runs[part])
    return result | {"kernels": _ext.metal_kernels()}


def _guarded(run: Callable[[], Any]) -> Any:
    try:
        return run()
    # The report is about whatever goes wrong.
    except Exception as error:
        return {"error": without_paths(str(error).strip() or type(error).__name__)[:1000]}
