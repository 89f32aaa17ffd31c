"""What recorded decode steps are made of, and whether it still is what it was."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import _ext
from ..environment import debug
from ..ops import Weight
from .ranks import Traffic


class Parts:
    """What modules are made of, every layer and array, where it is, and the steps of just that."""

    def __init__(self, roots: Sequence[nn.Module], table: Weight | None, can: bool):
        """Take the modules, the rows that tokens take where a step can, and whether it can run."""
        self.steps: dict[tuple[Any, ...], tuple[_ext.DecodeStep | None, Traffic]] = {}
        self._roots = list(roots)
        self._containers = [part for root in roots for part in _containers(root)]
        self._items = list(map(_items, self._containers))
        parts = [part for items in self._items for part in items]
        self._arrays = [part for part in parts if isinstance(part, mx.array)]
        self._values = _ext.ArrayValues(self._arrays)
        self.table = table
        self.recordable = can and _ext.DecodeStep.takes(self._arrays)
        if self.recordable:
            mx.eval(self._arrays)
        else:
            debug("decode steps run layer by layer: weights are streamed, adapted or traced")

    def are_in_place(self, roots: Sequence[nn.Module]) -> bool:
        """Whether these modules still have the parts, as they were, and no others."""
        return (
            len(roots) == len(self._roots)
            and all(map(operator.is_, roots, self._roots))
            and _ext.same_items(self._containers, self._items)
            and self._values.are_of(self._arrays)
        )


def _containers(part: Any) -> Iterator[Any]:
    """The modules, lists and dicts of a module, and itself."""
    if isinstance(part, dict | list):  # a module is a dict
        yield part
        for inner in part.values() if isinstance(part, dict) else part:
            yield from _containers(inner)


def _items(container: dict[Any, Any] | list[Any]) -> list[Any]:
    """What `_ext.same_items` compares a container with."""
    if isinstance(container, dict):
        return [part for item in container.items() for part in item]
    return list(container)
