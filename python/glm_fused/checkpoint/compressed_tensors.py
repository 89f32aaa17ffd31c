"""Configs of compressed-tensors: which modules are packed integers, and of how many bits."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..formats.weights import Format
from ..validation import show
from .folder import Checkpoint
from .quantization import parse_format
from .safetensors_header import quoted

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
BITS = (4, 8)
_CLASSES = ("Linear", "Embedding")  # of the modules that have matrices
_REGEX = "re:"


@dataclass(frozen=True)
class Patterns:
    """Modules by name, by regular expression or by class, as compressed-tensors lists them."""

    names: frozenset[str]
    expressions: tuple[re.Pattern[str], ...]
    classes: frozenset[str]

    @classmethod
    def parse(cls, where: str, value: Any) -> "Patterns":
        """A list of the config; ValueError names ``where`` and the entry."""
        if value is None:
            value = []
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"[config] {where} must be a list of strings, found {show(value)}.")
        expressions = []
        for entry in value:
            if entry.startswith(_REGEX):
                try:
                    expressions.append(re.compile(entry.removeprefix(_REGEX)))
                except (re.error, RecursionError, OverflowError) as error:
                    raise ValueError(
                        f"[config] {where}: {quoted(entry)} is no regular expression: {error}."
                    ) from None
        plain = {entry for entry in value if not entry.startswith(_REGEX)}
        classes = plain.intersection(_CLASSES)
        return cls(frozenset(plain - classes), tuple(expressions), frozenset(classes))

    def rank(self, path: str) -> int | None:
        """How closely the module is meant: 0 by its name, 1 by expression, 2 by class, or None."""
        if path in self.names:
            return 0
        if any(expression.match(path) for expression in self.expressions):
            return 1
        kind = "Embedding" if path.endswith(".embed_tokens") else "Linear"
        return 2 if kind in self.classes else None


@dataclass(frozen=True)
class PackQuantized:
    """Symmetric packed integers: groups of modules with a format each, and modules left out.

    An unsigned code of b bits stands for ``scale * (code - 2^(b - 1))``, which is an affine format
    of MLX with biases of ``-2^(b - 1) * scale``; both pack codes alike.
    """

    groups: tuple[tuple[Patterns, Format | None], ...]
    ignore: Patterns
    _known: dict[str, tuple[Format | None, bool]] = field(default_factory=dict, compare=False)

    def declared(self, path: str) -> tuple[Format | None, bool]:
        """The format for a module of the checkpoint, and whether the config names the module."""
        if path not in self._known:
            self._known[path] = self._find(path)
        return self._known[path]

    def _find(self, path: str) -> tuple[Format | None, bool]:
        ignored = self.ignore.rank(path)
        if ignored is not None:
            return None, ignored == 0
        ranked = [
            (rank, i)
            for i, (targets, _) in enumerate(self.groups)
            if (rank := targets.rank(path)) is not None
        ]
        if not ranked:
            return None, False
        rank, i = min(ranked)
        return self.groups[i][1], rank == 0


def parse(key: str, entry: Mapping[str, Any]) -> PackQuantized:
    """The groups of a ``quantization_config``.

    Raises ValueError, naming the entry, for formats other than symmetric packed integers of 4 or 8
    bits in groups, and for sparse or transformed weights.
    """
    _expect(f"{key}.format", entry.get("format"), PACKED, "mixed-precision")
    for name in ("sparsity_config", "transform_config"):
        if entry.get(name):
            raise ValueError(
                f"[config] {key}: {name} {show(entry[name])}, expected none: such weights are not"
                " those of the model; load a checkpoint without."
            )
    groups = entry.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"[config] {key}: config_groups {show(groups)}, expected an object.")
    parsed = []
    for name, group in groups.items():
        where = f"{key}.config_groups[{quoted(name)}]"
        if not isinstance(group, Mapping):
            raise ValueError(f"[config] {where} must be an object, found {show(group)}.")
        targets = Patterns.parse(f"{where}.targets", group.get("targets"))
        parsed.append((targets, _format(where, group)))
    return PackQuantized(tuple(parsed), Patterns.parse(f"{key}.ignore", entry.get("ignore")))


def _format(where: str, group: Mapping[str, Any]) -> Format | None:
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise ValueError(f"[config] {where}.weights must be an object, found {show(weights)}.")
    _expect(f"{where}.format", group.get("format"), PACKED, None)
    where = f"{where}.weights"
    _expect(f"{where}.type", weights.get("type", "int"), "int")
    _expect(f"{where}.num_bits", weights.get("num_bits", 8), *BITS)
    _expect(f"{where}.symmetric", weights.get("symmetric", True), True)
    _expect(f"{where}.strategy", weights.get("strategy", "group"), "group")
    _expect(f"{where}.dynamic", weights.get("dynamic", False), False)
    _expect(f"{where}.actorder", weights.get("actorder"), None, False, "weight", "static")
    packing = {"bits": weights.get("num_bits", 8), "group_size": weights.get("group_size")}
    if packing["group_size"] is None:
        raise ValueError(f"[config] {where}: group_size None, expected 32, 64 or 128.")
    return parse_format(where, packing)


def _expect(where: str, found: object, *options: object) -> None:
    if not any(type(found) is type(option) and found == option for option in options):
        expected = " or ".join(show(option) for option in options)
        raise ValueError(f"[config] {where} is {show(found)}, expected {expected}.")


def check_stored_shapes(
    checkpoint: Checkpoint, packed: Mapping[str, tuple[Format, tuple[int, ...]]]
) -> None:
    """Read the ``weight_shape`` of each module and raise ValueError unless it is as in ``packed``.

    The headers have to have passed ``check_tensors``.
    """
    by_file: dict[str, list[str]] = {}
    for path in packed:
        name = f"{path}.weight_shape"
        by_file.setdefault(checkpoint.tensors[name].file, []).append(path)
    for file_name, paths in by_file.items():
        with (checkpoint.folder / file_name).open("rb") as file:
            for path in paths:
                info = checkpoint.tensors[f"{path}.weight_shape"]
                file.seek(info.start)
                sizes = struct.unpack(
                    "<2q" if info.dtype == "I64" else "<2i", file.read(info.nbytes)
                )
                if sizes != (expected := packed[path][1]):
                    raise ValueError(
                        f"[checkpoint] {path}.weight_shape ({file_name}) is {list(sizes)}, expected"
                        f" {list(expected)} as config.json says."
                    )
