"""What a profile looks like: tables for a terminal or a pipe, and a drawing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..memory import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FORWARDS = ("decode", "verify", "prompt")
BAR = 12  # characters of a stage that is all of the step
WIDE, WIDTH = 90, 100  # columns from which on there are bars, and columns in a pipe
GRAPH, OTHER = "graph, in Python", "other"
NOTE = (
    "weights: read by the forward; GB/s: of these and cached rows; of read: of the bandwidth of"
    f" plain reads. {OTHER}: the whole less graph and stages, which were timed alone: dispatch,"
    " cache updates, choosing a token, and a prompt's last layer, of which only the cache is kept."
)


def print_profile(result: dict[str, Any]) -> None:
    """Print the tables on stdout, in colour where that is a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    mark = "█" if console.encoding.startswith("utf") else "#"
    for name in filter(result.__contains__, FORWARDS):
        console.print(table(result[name], mark if console.width >= WIDE else ""))
    console.print(NOTE, style="dim")


def table(forward: dict[str, Any], mark: str) -> Table:
    """The table of a forward: its stages, what they leave over, and the whole.

    Shares are shown as bars of ``mark`` too, unless that is empty.
    """
    from rich import box
    from rich.table import Table

    made = Table(title=title(forward), title_justify="left", title_style="bold", box=box.SIMPLE)
    made.add_column("stage", no_wrap=True)
    for name in ("layers", "ms", "share", "weights", "GB/s", "of read"):
        made.add_column(name, justify="right", no_wrap=True)
    if mark:
        made.add_column("", no_wrap=True)
    whole = forward["whole_seconds"]

    def add(name: str, layers: str, seconds: float, read: Sequence[str] = ("", "", "")) -> None:
        share = seconds / whole
        bar = mark * round(BAR * min(max(share, 0), 1))
        cells = name, layers, f"{1e3 * seconds:.3f}", f"{round(100 * share)} %", *read
        made.add_row(*cells, *([bar] if mark else []))

    for row in forward["stages"]:
        rates = f"{row['gb_per_s']:.2f}", f"{row['fraction']:.2f}"
        add(row["stage"], str(row["layers"]), row["seconds"], (size(row["read_bytes"]), *rates))
    add(GRAPH, "", forward["graph_seconds"])
    add(OTHER, "", forward["other_seconds"])
    made.add_section()
    weights = sum(row["read_bytes"] for row in forward["stages"])
    rate = (weights + sum(row["cache_bytes"] for row in forward["stages"])) / whole / 1e9
    rates = f"{rate:.2f}", f"{rate / forward['read_gb_per_s']:.2f}"
    add("whole", "", whole, (size(weights), *rates))
    return made


def title(forward: dict[str, Any]) -> str:
    """One line: how many tokens, after how many, how fast, and what memory gives."""
    tokens, seconds = forward["tokens"], forward["whole_seconds"]
    what = "one token" if tokens == 1 else f"{tokens} tokens"
    return (
        f"{what} after {forward['cached']}: {1e3 * seconds:.2f} ms, {tokens / seconds:.1f} tok/s;"
        f" plain reads {forward['read_gb_per_s']:.1f} GB/s"
    )


def draw(result: dict[str, Any], figure: Figure) -> None:
    """Draw each forward as a bar from left to right, one stage below where the last one ended."""
    for i, name in enumerate(filter(result.__contains__, FORWARDS), 1):
        forward = result[name]
        axis = figure.add_subplot(len(result), 1, i)
        parts = [(row["stage"], row["seconds"], row["fraction"]) for row in forward["stages"]]
        parts += [(GRAPH, forward["graph_seconds"], None), (OTHER, forward["other_seconds"], None)]
        at, furthest = 0.0, forward["whole_seconds"]
        for line, (_, seconds, fraction) in enumerate(parts):
            color = "C0" if fraction is not None else "0.7"
            axis.barh(line, 1e3 * seconds, left=1e3 * at, color=color)
            text = f" {round(100 * seconds / forward['whole_seconds'])} %"
            if fraction is not None:
                text += f", {fraction:.2f} of plain reads"
            axis.text(1e3 * max(at, at + seconds), line, text, va="center", fontsize=8)
            at += seconds
            furthest = max(furthest, at)  # stages may take longer alone than the step does
        axis.set_yticks(range(len(parts)), [stage for stage, _, _ in parts])
        axis.set_xlim(0, 1e3 * furthest * 1.3)  # room for the last one's text
        axis.invert_yaxis()
        axis.set_xlabel("ms")
        axis.set_title(title(forward), loc="left", fontsize=9)
