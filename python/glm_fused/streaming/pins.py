"""Pins, which are the experts that a bank never gives up, as a file or a caller names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoint.folder import read_json
from ..validation import show


def read_pins(path: Path) -> dict[int, list[int]]:
    """Read pins from a JSON file, ``{layer: [experts]}``; ValueError names the file and entry."""
    pins = {}
    for layer, experts in read_json(path).items():
        plain = layer.isascii() and layer.isdecimal() and (layer == "0" or layer[0] != "0")
        numbers = isinstance(experts, list) and all(type(e) is int and e >= 0 for e in experts)
        if not plain or len(layer) > 9 or not numbers:
            raise ValueError(f"{path}: {show({layer: experts})}, expected {{layer: [experts]}}.")
        pins[int(layer)] = experts
    return pins


def check_pins(pins: Mapping[int, Sequence[int]], experts: Mapping[int, int]) -> None:
    """Raise ValueError for layers or experts that a model lacks, and for experts named twice.

    ``experts`` has the number of experts of each layer that has any.
    """
    for layer, pinned in pins.items():
        if layer not in experts:
            raise ValueError(
                f"[pins] layer {layer} has no routed experts; those that do are"
                f" {min(experts)} to {max(experts)}."
            )
        for expert in pinned:
            if type(expert) is not int or not 0 <= expert < experts[layer]:
                raise ValueError(
                    f"[pins] layer {layer}: expert {show(expert)}, expected 0 to"
                    f" {experts[layer] - 1}."
                )
        if len(set(pinned)) != len(pinned):
            twice = next(e for i, e in enumerate(pinned) if e in pinned[:i])
            raise ValueError(f"[pins] layer {layer}: expert {twice} is named twice.")
