"""The packed sidecar: one file a layer, one aligned slab an expert.

``layer_003.bin`` is a header page, then a slab per expert: its tensors back to back, padded to
16 KiB. ``manifest.json`` names the files with sizes and SHA-256, the tensors, a checksum of every
expert, and the checkpoint that they came from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, read_json
from .config import ModelArgs
from .expert_source import ExpertSource, LayerExperts, Part, checkpoint_source
from .safetensors_header import ITEM_BYTES, regular_file_size
from .validation import show

FORMAT, VERSION = "glm-fused-experts", 1
PAGE = 16384
MANIFEST, UNFINISHED = "manifest.json", "manifest.unfinished.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class PackedLayer:
    """One layer file as the manifest describes it."""

    layer: int
    size: int
    sha256: str
    parts: tuple[Part, ...]
    checksums: tuple[int, ...]

    @property
    def file(self) -> str:
        return layer_file(self.layer)

    @property
    def slab(self) -> int:
        return slab_bytes(self.parts)

    def describe(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "size": self.size,
            "sha256": self.sha256,
            "parts": [[part.name, part.dtype, list(part.shape)] for part in self.parts],
            "checksums": [f"{value:016x}" for value in self.checksums],
        }


@dataclass(frozen=True)
class Sidecar:
    """A manifest that was read: ``set_id`` says which checkpoint the experts are of."""

    path: Path
    set_id: str
    layers: tuple[PackedLayer, ...]

    @classmethod
    def open(cls, path: Path) -> Sidecar:
        """Read the manifest and check every file's size and header page.

        Raises FileNotFoundError for a missing file and ValueError, naming the file, for one that is
        malformed, truncated, or another layer's or sidecar's.
        """
        if not (path / MANIFEST).exists():
            if (path / UNFINISHED).exists():
                raise ValueError(f"[sidecar] {path} is not finished: run `sidecar pack` again.")
            raise FileNotFoundError(f"[sidecar] {path} has no {MANIFEST}.")
        sidecar = read_manifest(path / MANIFEST)
        for layer in sidecar.layers:
            sidecar.check_file(layer)
        return sidecar

    def check_file(self, layer: PackedLayer) -> None:
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

    def verify(self) -> Iterator[tuple[str, str]]:
        """Hash every file; yields its name and what is wrong with it, or "" ."""
        for layer in self.layers:
            digest = hashlib.sha256()
            with (self.path / layer.file).open("rb") as f:
                while block := f.read(_CHUNK):
                    digest.update(block)
            found = digest.hexdigest()
            wrong = "" if found == layer.sha256 else f"SHA-256 {found}, expected {layer.sha256}"
            yield layer.file, wrong

    def source(self) -> ExpertSource:
        """The experts in this sidecar."""
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


def sidecar_source(path: Path, checkpoint: Checkpoint, args: ModelArgs) -> ExpertSource:
    """The experts of a sidecar that was packed from this checkpoint.

    Raises what ``Sidecar.open`` does, and ValueError for another checkpoint's sidecar.
    """
    sidecar = Sidecar.open(path)
    expected = set_id(checkpoint, args)
    if sidecar.set_id != expected:
        raise ValueError(
            f"[sidecar] {path} was packed from a checkpoint with id {sidecar.set_id}, but"
            f" {checkpoint.path} has {expected}."
        )
    return sidecar.source()


def layer_file(layer: int) -> str:
    return f"layer_{layer:03d}.bin"


def slab_bytes(parts: Iterable[Part]) -> int:
    return -(-sum(part.nbytes for part in parts) // PAGE) * PAGE


def header_page(set_id: str, layer: int) -> bytes:
    header = {"format": FORMAT, "version": VERSION, "set": set_id, "layer": layer}
    return json.dumps(header).encode().ljust(PAGE, b"\0")


def set_id(checkpoint: Checkpoint, args: ModelArgs) -> str:
    """What tells checkpoints apart: the experts' headers and the routers' contents."""
    digest = hashlib.sha256()
    for i, layer in checkpoint_source(checkpoint, args).layers.items():
        digest.update(repr((i, layer.experts, layer.parts)).encode())
        for leaf in ("weight", "e_score_correction_bias"):
            info = checkpoint.tensors[f"model.layers.{i}.mlp.gate.{leaf}"]
            with (checkpoint.path / info.file).open("rb") as f:
                f.seek(info.start)
                left = info.nbytes
                while left and (block := f.read(min(left, _CHUNK))):
                    digest.update(block)
                    left -= len(block)
    return digest.hexdigest()[:32]


def write_manifest(path: Path, set_id: str, layers: Iterable[PackedLayer]) -> None:
    """Write a manifest in one step: readers see the old file or the new one."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "set": set_id,
        "layers": [layer.describe() for layer in layers],
    }
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as f:
        json.dump(document, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def read_manifest(path: Path) -> Sidecar:
    """A manifest, finished or not, checked by itself; the files are not looked at."""
    document = read_json(path)
    kind = (document.get("format"), document.get("version"))
    if kind != (FORMAT, VERSION):
        raise ValueError(f"[sidecar] {path} is {show(kind)}, expected {(FORMAT, VERSION)}.")
    try:
        layers = tuple(_layer(entry) for entry in document["layers"])
        numbers = [layer.layer for layer in layers]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"layers {show(numbers)} are not ascending")
        if not isinstance(document["set"], str):
            raise ValueError(f"set {show(document['set'])} is not a text")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"[sidecar] {path} is malformed: {error!r}.") from None
    return Sidecar(path.parent, document["set"], layers)


def _layer(entry: dict[str, Any]) -> PackedLayer:
    parts = tuple(Part(name, dtype, tuple(shape)) for name, dtype, shape in entry["parts"])
    for part in parts:
        sizes = all(type(n) is int and n > 0 for n in part.shape)
        if part.dtype not in ITEM_BYTES or not part.shape or not sizes:
            raise ValueError(f"part {show(part)}")
    checksums = tuple(int(text, 16) for text in entry["checksums"])
    layer = PackedLayer(entry["layer"], entry["size"], entry["sha256"], parts, checksums)
    if type(layer.layer) is not int or not 0 <= layer.layer < 10**6:
        raise ValueError(f"layer {show(layer.layer)}")
    expected = PAGE + len(checksums) * layer.slab
    if layer.size != expected:
        raise ValueError(f"layer {layer.layer} has size {show(layer.size)}, expected {expected}")
    return layer
