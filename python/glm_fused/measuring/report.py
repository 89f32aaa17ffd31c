"""What a measurement looks like as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .measure import PARTS


def format_measured(result: dict[str, Any]) -> str:
    """The text of what `glm_fused.measuring.measure.measure` gives."""
    lines = [f"{result['backend']}, {result['size']}, {result['experts']} experts a layer"]
    for part in PARTS:
        if part in result:
            found = result[part]
            rows = found if isinstance(found, list) else [found]
            lines += ["", part, *(f"  {_line(row)}" for row in rows)]
    if kernels := result["kernels"]:
        seconds = sum(kernel["seconds"] for kernel in kernels)
        lines += ["", f"{len(kernels)} kernels, compiled in {seconds:.1f} s"]
        lines += [f"  {_line(kernel)}" for kernel in kernels]
    return "\n".join(lines)


def format_all(results: Sequence[dict[str, Any]]) -> str:
    """`format_measured` of several."""
    return "\n\n".join(map(format_measured, results))


def _line(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in row.items() if value is not None)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={text}" for name, text in value.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
