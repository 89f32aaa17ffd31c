"""Runs the cases on a backend and judges the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx

from ..ops import routes
from .backends import CPU, Backend
from .case import Case
from .compare import Outputs, contraction, digest, evaluated, first_difference, ulps
from .machine import without_paths
from .synthetic import DTYPES

MAX_ERROR = 4000


@dataclass
class Result:
    """One case on one backend.

    Attributes:
        digest: SHA-256 of the output's bits.
        equals_reference: whether the bits are the reference's; None where there is no unfused path
            of the same arithmetic.
        golden: which golden digests were found: "on" or "off" (contraction), "either" or "neither";
            None where none are kept.
        max_ulps_from_cpu: the largest difference from the same machine's CPU, in ulps of the
            largest value; None on the CPU, and where a value is not finite.
        difference: where the bits first differ from those of `against`.
        first_seconds: the time of the first evaluation, which compiles the kernels on a GPU.
        seconds: the time of the second evaluation.
        kernels: the names of the kernels launched, where known.
        error: what was raised instead of a result.
        failures: what is wrong, one clause each; empty when the case passed.
    """

    case: str
    digest: str | None = None
    equals_reference: bool | None = None
    golden: str | None = None
    max_ulps_from_cpu: float | None = None
    difference: dict[str, Any] | None = None
    against: str | None = None
    first_seconds: float | None = None
    seconds: float | None = None
    kernels: list[str] | None = None
    error: str | None = None
    failures: list[str] = field(default_factory=list)


def run_backend(
    backend: Backend, cases: Sequence[Case], step: Callable[[str], None]
) -> dict[str, Any]:
    """Run all cases on one backend, JSON-ready; `step` is called with each case as it begins.

    A GPU's summary counts this package's kernels alone; stock MLX's are among the results.
    """
    results, ours = [], []
    for case in cases:
        if backend.name == "metal-sim" and not case.has_metal_kernel:
            continue
        step(f"{backend.title}: {case.name}")
        results.append(_run(backend, case))
        if backend.name == "cpu" or case.has_metal_kernel:
            ours.append(results[-1])
    failed = [r for r in results if r.failures]
    distances = [r.max_ulps_from_cpu for r in ours if r.max_ulps_from_cpu is not None]
    return {
        "backend": backend.name,
        "contraction_requested": backend.contract,
        "contraction_found": _contraction_found(ours),
        "cases": len(results),
        "failed": len(failed),
        "max_ulps_from_cpu": max(distances, default=None),
        "results": [asdict(r) for r in results],
        "shaders": _shaders(ours) if backend.runs_kernels_on_gpu else [],
    }


def _run(backend: Backend, case: Case) -> Result:
    result = Result(case.name)
    try:
        _evaluate(backend, case, result)
    # The report is about whatever goes wrong, such as a shader that fails to compile.
    except Exception as error:
        result.error = without_paths(str(error).strip() or type(error).__name__)[:MAX_ERROR]
        result.failures.append("raised an error")
    return result


def _evaluate(backend: Backend, case: Case, result: Result) -> None:
    with CPU.active():
        arguments = case.arguments()
        mx.eval(arguments)
    found = _fused(backend, case, arguments, result)
    result.digest = digest(found)
    if reference := _reference(backend, case, arguments):
        result.equals_reference = _same(result, found, reference, "the reference")
        if not result.equals_reference:
            result.failures.append("differs from the reference")
    if backend.runs_kernels_on_gpu:
        with CPU.active():
            cpu = evaluated(case.call(arguments, reference=False))
        _same(result, found, cpu, "the CPU")
        result.max_ulps_from_cpu = ulps(found, cpu, DTYPES[case.dtype])
    result.golden = contraction(case.name, result.digest)
    _judge_golden(backend, case, result)


def _fused(backend: Backend, case: Case, arguments: dict[str, Any], result: Result) -> Outputs:
    obstacle = routes.metal_obstacle(case.op, *case.sizes())
    if obstacle and backend.name == "metal" and case.has_metal_kernel:
        raise RuntimeError(obstacle)
    with backend.active():
        start = time.perf_counter()
        evaluated(case.call(arguments, reference=False))
        result.first_seconds = time.perf_counter() - start
        result.kernels = backend.kernels_launched()
        start = time.perf_counter()
        found = evaluated(case.call(arguments, reference=False))
        result.seconds = time.perf_counter() - start
        backend.kernels_launched()
    return found


def _reference(backend: Backend, case: Case, arguments: dict[str, Any]) -> Outputs | None:
    """The unfused path's result; None where its arithmetic is not the backend's."""
    if backend.name == "metal" and not case.has_metal_kernel:
        return None
    if backend.contract is False:
        return None
    with (CPU if backend.name == "metal-sim" else backend).active():
        return evaluated(case.call(arguments, reference=True))


def _same(result: Result, found: Outputs, expected: Outputs, what: str) -> bool:
    difference = first_difference(found, expected)
    if difference and result.difference is None:
        result.difference, result.against = difference, what
    return difference is None


def _judge_golden(backend: Backend, case: Case, result: Result) -> None:
    if result.golden is None:
        result.failures.append("has no golden digest")
    elif backend.contract is None:
        if case.has_metal_kernel and result.golden == "neither":
            result.failures.append("matches no golden digest")
    elif result.golden not in ("either", "on" if backend.contract else "off"):
        result.failures.append(f"does not match its golden digest (found: {result.golden})")


def _contraction_found(results: Sequence[Result]) -> str | None:
    """Which golden digests the results match: "on", "off", "neither", or "mixed" if they vary."""
    found = {r.golden for r in results if r.golden is not None} - {"either"}
    if not found:
        return None
    return found.pop() if len(found) == 1 else "mixed"


def _shaders(results: Sequence[Result]) -> list[dict[str, Any]]:
    """How much longer than the second the first evaluation took, for each case with our kernels."""
    made = []
    for r in results:
        seconds = None
        if r.first_seconds is not None and r.seconds is not None:
            seconds = max(r.first_seconds - r.seconds, 0.0)
        made.append(
            {"case": r.case, "kernels": r.kernels, "compile_seconds": seconds, "error": r.error}
        )
    return made
