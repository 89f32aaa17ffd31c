"""The packed sidecar, which has one file per layer and in it one aligned slab per expert.

``layer_003.bin`` is a header page, then a slab per expert: its tensors back to back, padded to
16 KiB. ``manifest.json`` names the files with sizes and SHA-256, the tensors, a checksum of every
expert, and the checkpoint that they came from; whether that is the one at hand is for
`glm_fused.streaming.sidecar_identity` to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.folder import MAX_JSON_BYTES
from ..checkpoint.safetensors_header import DTYPES, MAX_RANK, parse_json_object, regular_file_size
from ..checkpoint.writing import new_file
from ..formats.weights import PLANES
from ..models.tensors import PROJECTIONS
from ..validation import MAX_SIZE, show
from .source import ExpertSource, LayerExperts, Part

FORMAT, VERSION = "glm-fused-experts", 2
PAGE = 16384
MANIFEST, UNFINISHED = "manifest.json", "manifest.unfinished.json"

LAYER_FILE = re.compile(r"layer_[0-9]+\.bin")
# What `glm_fused.checkpoint.writing` calls such a file before it is whole.
TEMPORARY = re.compile(r"(layer_[0-9]+\.bin|manifest(\.unfinished)?\.json)(\.[0-9a-f]{16})?\.tmp")

_PART_NAMES = frozenset(f"{p}.{plane}" for p in PROJECTIONS for plane in PLANES)
_MAX_LAYERS, _MAX_BYTES = 10**6, 2**63 - 1
ALL = range(_MAX_LAYERS)

# Each shard that holds experts has its size and its time of modification, in nanoseconds.
Shards = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class PackedLayer:
    """One layer file as the manifest describes it."""

    layer: int
    sha256: str
    parts: tuple[Part, ...]
    checksums: tuple[int, ...]

    @property
    def file(self) -> str:
        """The file's name."""
        return layer_file(self.layer)

    @property
    def slab(self) -> int:
        """The bytes of an expert's slab."""
        return slab_bytes(self.parts)

    @property
    def size(self) -> int:
        """The bytes that the file has to have."""
        return PAGE + len(self.checksums) * self.slab

    def describe(self) -> dict[str, Any]:
        """The layer's entry in the manifest."""
        return {
            "layer": self.layer,
            "size": self.size,
            "sha256": self.sha256,
            "parts": [[part.name, part.dtype, list(part.shape)] for part in self.parts],
            "checksums": [f"{value:016x}" for value in self.checksums],
        }


@dataclass(frozen=True)
class Sidecar:
    """A manifest that was read.

    ``set_id`` says which checkpoint the experts are from, and ``shards`` which state of it.
    """

    path: Path
    set_id: str
    shards: Shards
    layers: tuple[PackedLayer, ...]

    @classmethod
    def open(cls, path: Path, layers: Container[int] = ALL) -> Sidecar:
        """Read the manifest and check the size and header page of each file of these layers.

        Raises FileNotFoundError for a missing file, and ValueError, naming the file, for one that
        is malformed, truncated, or another layer's or sidecar's.
        """
        check_finished(path)
        sidecar = read_manifest(path / MANIFEST)
        for layer in sidecar.layers:
            if layer.layer in layers:
                sidecar.check_file(layer)
        return sidecar

    def check_file(self, layer: PackedLayer) -> None:
        """Raise ValueError unless a layer's file has its size and its header page."""
        file = self.path / layer.file
        size = regular_file_size(file)
        if size != layer.size:
            raise ValueError(f"[sidecar] {file}: {size} bytes, expected {layer.size}.")
        with file.open("rb") as f:
            found, expected = f.read(PAGE), header_page(self.set_id, layer.layer)
        if found != expected:
            raise ValueError(
                f"[sidecar] {file} begins with {show(found.rstrip(bytes(1))[:200])}, expected"
                f" {show(expected.rstrip(bytes(1)))}: not this sidecar's layer {layer.layer}."
            )

    def source(self) -> ExpertSource:
        """Where the experts lie in this sidecar's files."""
        layers = {}
        for i, layer in enumerate(self.layers):
            locations = []
            for e in range(len(layer.checksums)):
                at = PAGE + e * layer.slab
                for part in layer.parts:
                    locations.append((i, at))
                    at += part.nbytes
            layers[layer.layer] = LayerExperts(layer.parts, tuple(locations), layer.checksums)
        files = {self.path / layer.file: layer.size for layer in self.layers}
        return ExpertSource("sidecar", files, layers)


def check_finished(path: Path) -> None:
    """Raise an error, which says what is missing, for a folder without a manifest."""
    if (path / MANIFEST).exists():
        return
    if (path / UNFINISHED).exists():
        raise ValueError(f"[sidecar] {path} is not finished: run `glm-fused sidecar import` again.")
    raise FileNotFoundError(f"[sidecar] {path} has no {MANIFEST}.")


def layer_file(layer: int) -> str:
    """The name of a layer's file."""
    return f"layer_{layer:03d}.bin"


def slab_bytes(parts: Iterable[Part]) -> int:
    """The bytes of an expert's slab, in whole pages."""
    return -(-sum(part.nbytes for part in parts) // PAGE) * PAGE


def header_page(set_id: str, layer: int) -> bytes:
    """The first page of a layer's file, which says what it is."""
    header = {"format": FORMAT, "version": VERSION, "set": set_id, "layer": layer}
    return json.dumps(header).encode().ljust(PAGE, b"\0")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a file in one step: readers see the old one or the new one."""
    with new_file(path) as f:
        f.write(json.dumps(document, indent=1).encode())


def write_manifest(sidecar: Sidecar, name: str = MANIFEST) -> None:
    """Write a manifest in one step."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "set": sidecar.set_id,
        "shards": {name: list(state) for name, state in sidecar.shards.items()},
        "layers": [layer.describe() for layer in sidecar.layers],
    }
    write_json(sidecar.path / name, document)


def read_manifest(path: Path) -> Sidecar:
    """Read a manifest, finished or not, and check it by itself; its files are not looked at.

    Raises FileNotFoundError if there is none, and ValueError, naming the entry with what was found
    and expected, for anything that ``write_manifest`` would not have written.
    """
    if (nbytes := regular_file_size(path)) > MAX_JSON_BYTES:
        raise ValueError(f"[sidecar] {path}: {nbytes} bytes, expected at most {MAX_JSON_BYTES}.")
    document = parse_json_object(path.read_bytes(), f"[sidecar] {path}")
    kind = (document.get("format"), document.get("version"))
    if type(kind[1]) is int and kind == (FORMAT, 1):
        raise ValueError(
            f"[sidecar] {path} is of version 1, which did not record what its experts are compared"
            f" with (expected {VERSION}): delete {path.parent} and run `glm-fused sidecar import`"
            " again."
        )
    if type(kind[1]) is not int or kind != (FORMAT, VERSION):
        raise ValueError(f"[sidecar] {path} is {show(kind)}, expected {(FORMAT, VERSION)}.")
    try:
        sidecar = _sidecar(path.parent, document)
        _expect(sidecar.layers or path.name == UNFINISHED, "layers", [], "a list, not empty")
    except ValueError as error:
        raise ValueError(
            f"[sidecar] {path} is malformed: {error}; delete it and run `glm-fused sidecar import`"
            " again."
        ) from None
    return sidecar


def _sidecar(path: Path, document: dict[str, Any]) -> Sidecar:
    _expect_keys(document, "the manifest", "format", "version", "set", "shards", "layers")
    _expect_hex(document["set"], "set", 32)
    shards = document["shards"]
    _expect(isinstance(shards, dict) and shards, "shards", shards, "an object, not empty")
    for name, state in shards.items():
        pair = isinstance(state, list) and len(state) == 2
        pair = pair and all(type(n) is int and abs(n) <= _MAX_BYTES for n in state)
        _expect(pair, f"shards[{show(name)}]", state, "[bytes, nanoseconds]")
    entries = document["layers"]
    _expect(isinstance(entries, list), "layers", entries, "a list")
    layers = tuple(_layer(entry, f"layers[{i}]") for i, entry in enumerate(entries))
    numbers = [layer.layer for layer in layers]
    _expect(numbers == sorted(set(numbers)), "the numbers of layers", numbers, "ascending ones")
    states = {name: (state[0], state[1]) for name, state in shards.items()}
    return Sidecar(path, document["set"], states, layers)


def _layer(entry: Any, what: str) -> PackedLayer:
    _expect_keys(entry, what, "layer", "size", "sha256", "parts", "checksums")
    number, parts, checksums = entry["layer"], entry["parts"], entry["checksums"]
    whole = type(number) is int and 0 <= number < _MAX_LAYERS
    _expect(whole, f"{what}: layer", number, f"an integer below {_MAX_LAYERS}")
    _expect_hex(entry["sha256"], f"{what}: sha256", 64)
    _expect(isinstance(parts, list) and parts, f"{what}: parts", parts, "a list, not empty")
    filled = isinstance(checksums, list) and checksums
    _expect(filled, f"{what}: checksums", checksums, "a list, not empty")
    for i, text in enumerate(checksums):
        _expect_hex(text, f"{what}: checksums[{i}]", 16)
    layer = PackedLayer(
        number,
        entry["sha256"],
        tuple(_part(part, f"{what}: parts[{i}]") for i, part in enumerate(parts)),
        tuple(int(text, 16) for text in checksums),
    )
    sized = type(entry["size"]) is int and entry["size"] == layer.size <= _MAX_BYTES
    _expect(sized, f"{what}: size", entry["size"], show(layer.size))
    return layer


def _part(entry: Any, what: str) -> Part:
    _expect(isinstance(entry, list) and len(entry) == 3, what, entry, "[name, dtype, shape]")
    name, dtype, shape = entry
    known = isinstance(name, str) and name in _PART_NAMES
    _expect(known, f"{what}: name", name, "that of an expert's tensor, such as gate_proj.weight")
    _expect(
        isinstance(dtype, str) and dtype in DTYPES, f"{what}: dtype", dtype, show(tuple(DTYPES))
    )
    sizes = isinstance(shape, list) and len(shape) <= MAX_RANK
    sizes = sizes and all(type(n) is int and 0 < n <= MAX_SIZE for n in shape)
    _expect(sizes, f"{what}: shape", shape, f"a list of at most {MAX_RANK} sizes")
    return Part(name, dtype, tuple(shape))


def _expect(right: object, what: str, found: object, expected: str) -> None:
    if not right:
        text = show(found)
        if len(text) > 120 and isinstance(found, (dict, list)):
            text = f"a {type(found).__name__} of {len(found)}"
        raise ValueError(f"{what} is {text}, expected {expected}")


def _expect_keys(entry: Any, what: str, *keys: str) -> None:
    expected = f"an object of {', '.join(keys)}"
    _expect(isinstance(entry, dict), what, entry, expected)
    _expect(entry.keys() == set(keys), f"the list of keys of {what}", list(entry), ", ".join(keys))


def _expect_hex(text: Any, what: str, digits: int) -> None:
    right = isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text)
    _expect(right, what, text, f"{digits} hexadecimal digits")
