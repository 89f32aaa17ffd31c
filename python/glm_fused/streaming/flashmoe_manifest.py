"""The manifest of Flash-MoE's sidecar, version 1: where each tensor of routed experts lies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from ..checkpoint.gguf_names import model_name
from ..checkpoint.gguf_types import TYPES_BY_NAME, GgmlType
from ..models.config import MAX_LAYERS
from ..validation import MAX_SIZE, show

KIND, SCHEMA = "flashmoe_gguf", 1
WHOLE = "layer_major_whole_tensor"
BY_EXPERT = ("layer_major_expert", "expert_major")
# The projections in a tensor of each family; several share an expert's rows evenly.
FAMILIES = {
    "ffn_gate_exps": ("gate_proj",),
    "ffn_up_exps": ("up_proj",),
    "ffn_down_exps": ("down_proj",),
    "ffn_gate_up_exps": ("gate_proj", "up_proj"),
}
_SHARED = re.compile(r"ffn_(gate|up|down)_shexp")  # of experts that every token takes
_SHA256 = re.compile("[0-9a-f]{64}")
_MOST = 2**62


class Entry(NamedTuple):
    """A tensor [experts, n, k]: expert e begins at ``offset + e * stride`` of a file.

    ``sha256``, of its experts' bytes in order, is this package's own addition to the format.
    """

    layer: int
    family: str
    type: GgmlType
    shape: tuple[int, int, int]
    file: str
    offset: int
    stride: int
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What GGUF calls the tensor."""
        return f"blk.{self.layer}.{self.family}.weight"

    @property
    def model_name(self) -> str:
        """What the model calls it."""
        return model_name(self.name)

    @property
    def expert_bytes(self) -> int:
        return prod(self.shape[1:]) // self.type.columns * self.type.nbytes


def read_entries(document: dict[str, Any]) -> Iterator[Entry]:
    """The routed experts' tensors; those of shared experts are the model file's own."""
    _integer(document, "schema_version", SCHEMA, SCHEMA)
    _expect(document, "sidecar_kind", document.get("sidecar_kind") == KIND, repr(KIND))
    layout = document.get("layout")
    layouts = (WHOLE, *BY_EXPERT)
    _expect(document, "layout", layout in layouts, " or ".join(map(repr, layouts)))
    entries = document.get("entries")
    _expect(document, "entries", isinstance(entries, list) and entries, "a list, not empty")
    seen: set[tuple[int, str]] = set()
    for i, entry in enumerate(entries or ()):
        try:
            found = _entry(entry, layout != WHOLE)
        except ValueError as error:
            raise ValueError(f"entries[{i}]: {error}") from None
        if found is None:
            continue
        if found[:2] in seen:
            raise ValueError(f"entries[{i}]: {found.name} is there twice")
        seen.add(found[:2])
        yield found


def _entry(entry: Any, by_expert: bool) -> Entry | None:
    if not isinstance(entry, dict):
        raise ValueError(f"{show(entry)}, expected an object")
    layer, family = _integer(entry, "layer", 0, MAX_LAYERS), entry.get("tensor_family")
    if isinstance(family, str) and _SHARED.fullmatch(family):
        return None
    _expect(entry, "tensor_family", isinstance(family, str) and family in FAMILIES,
            " or ".join(map(repr, FAMILIES)))  # fmt: skip
    name = f"blk.{layer}.{family}.weight"
    for key in ("tensor_name", "original_gguf_tensor_name"):
        _expect(entry, key, entry.get(key, name) == name, repr(name))
    _expect(entry, "expert_id", entry.get("expert_id") is None, "null")
    kind = entry.get("quant_type")
    type_ = TYPES_BY_NAME.get(kind.upper()) if isinstance(kind, str) else None
    _expect(entry, "quant_type", type_ is not None, "a type of ggml")
    assert type_ is not None
    columns, rows, experts = shape = _shape(entry, type_, len(FAMILIES[str(family)]))
    found = Entry(layer, str(family), type_, (experts, rows, columns), "", 0, 0)
    for key, expected in (
        ("block_size", type_.columns),
        ("bytes_per_expert", found.expert_bytes),
        ("exact_byte_length", experts * found.expert_bytes),
    ):
        right = type(entry.get(key)) is int and entry[key] == expected
        _expect(entry, key, right, f"{expected} for {type_.name} {list(shape)}")
    _expect(entry, "expert_major", entry.get("expert_major", by_expert) is by_expert,
            str(by_expert).lower() + " as the layout says")  # fmt: skip
    stride = found.expert_bytes
    if by_expert:
        stride = _integer(entry, "expert_stride", stride, _MOST)
    file = entry.get("repacked_file")
    _expect(entry, "repacked_file", isinstance(file, str) and _is_plain(file),
            "the path of a file below the manifest")  # fmt: skip
    offset = _integer(entry, "repacked_offset", 0, _MOST)
    digest = entry.get("sha256")
    right = digest is None or (isinstance(digest, str) and _SHA256.fullmatch(digest))
    _expect(entry, "sha256", right, "64 hexadecimal digits")
    return found._replace(file=str(file), offset=offset, stride=stride, sha256=digest)


def _shape(entry: dict[str, Any], kind: GgmlType, shared_by: int) -> tuple[int, int, int]:
    """The columns of a row, the rows of an expert and the experts."""
    shape = entry.get("shape")
    sizes = isinstance(shape, list) and len(shape) == 3
    sizes = sizes and all(type(n) is int and 0 < n <= MAX_SIZE for n in shape or ())
    _expect(entry, "shape", sizes, "[columns, rows, experts]")
    columns, rows, experts = entry["shape"]
    whole = columns % kind.columns == 0 and rows % shared_by == 0
    _expect(entry, "shape", whole, f"rows of whole blocks of {kind.columns} ({kind.name})")
    return columns, rows, experts


def _integer(entry: dict[str, Any], key: str, low: int, high: int) -> int:
    value = entry.get(key)
    whole = type(value) is int and low <= value <= high
    _expect(entry, key, whole, str(low) if low == high else f"an integer from {low} to {high}")
    return int(value or 0)


def _expect(entry: dict[str, Any], key: str, right: object, expected: str) -> None:
    if not right:
        found = f"is {show(entry[key])}" if key in entry else "is missing"
        raise ValueError(f"{key} {found}, expected {expected}")


def _is_plain(file: str) -> bool:
    path = PurePosixPath(file)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and "\\" not in file and file.isprintable() and len(file) <= 255
