"""What a conversion is asked to write: where to, and in which formats."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..formats.weights import Format
from ..models.tensors import Module


class Types(NamedTuple):
    """The formats for weights of routed experts and for the others; None leaves them as they are.

    Routers and norms have none, and indexers those that are floats: quantized ones cost more than
    they save.
    """

    experts: Format | None = None
    dense: Format | None = None

    def of(self, module: Module) -> Format | None:
        """The format asked for a module's weight."""
        fmt = self.experts if module.experts else self.dense
        floats = fmt is None or fmt.mode == "dense"
        return fmt if module.quantizable and (floats or not module.sensitive) else None


def check_place(out: Path, source: Path) -> None:
    """Raise an error unless a new ``out`` can be written outside of the folder that is read."""
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"[convert] {out.absolute().parent} does not exist.")
    target, folder = out.resolve(), source.resolve()
    if folder == target or folder in target.parents or target in folder.parents:
        raise ValueError(
            f"[convert] {out} and the checkpoint {source} lie in one another, expected another"
            " folder."
        )


def check_rows(name: str, columns: int, group: int, fmt: Format) -> None:
    """Raise ValueError unless rows of so many ``columns`` are whole groups of a format."""
    if columns % group:
        raise ValueError(
            f"[convert] {name} has rows of {columns}, expected a multiple of {group} for {fmt};"
            " choose another type."
        )
