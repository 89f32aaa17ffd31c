"""Figures that commands write to a file, with matplotlib, which only they need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a plot needs matplotlib: pip install 'glm-fused[plot]'.") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the name of the file says.

    Raises ValueError for a file that cannot be written, and for a name of no format.
    """
    try:
        figure.savefig(path)
    except OSError as error:
        raise ValueError(f"--plot: {path}: {error.strerror}.") from None
