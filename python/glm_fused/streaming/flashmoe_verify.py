"""Reads all of a Flash-MoE sidecar, and compares it with the model that it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.folder import Checkpoint
from ..checkpoint.gguf_formats import format_of
from ..checkpoint.gguf_names import gguf_name
from ..models.tensor_names import is_expert
from ..validation import show
from .flashmoe import FlashMoeSidecar, parts_of
from .flashmoe_export import DENSE, chunks
from .flashmoe_manifest import FAMILIES, Entry
from .sidecar_identity import checked_source
from .source import ExpertReader, ExpertSource


@dataclass(frozen=True)
class Original:
    """A model with its routed experts, and where those lie."""

    checkpoint: Checkpoint
    source: ExpertSource

    @classmethod
    def open(cls, model: str) -> Original:
        """What the path of a model names; errors are those of opening it."""
        return cls(*checked_source(model))

    def places(self, entry: Entry) -> list[int]:
        """Which parts of an expert of the model are in a tensor of a sidecar.

        Raises ValueError, naming the tensor and what either has, unless they are of one form.
        """
        layer = self.source.layers.get(entry.layer)
        projections = FAMILIES[entry.family]
        found = (
            []
            if layer is None
            else [p for p in layer.parts if p.name.partition(".")[0] in projections]
        )
        known = format_of(entry.type.name) is not None
        mine = f"{entry.name} is {entry.type.name} {show(list(entry.shape))}"
        if layer is None or not known or found != parts_of(entry):
            its = ", ".join(f"{p.name} {p.dtype} {show(list(p.shape))}" for p in found)
            raise ValueError(
                f"[sidecar] {mine}, but an expert of layer {entry.layer} of"
                f" {self.checkpoint.path} has {its or 'no tensors'}."
            )
        if layer.experts != entry.shape[0]:
            raise ValueError(
                f"[sidecar] {mine}, but {self.checkpoint.path} has {layer.experts} experts there."
            )
        return [layer.parts.index(part) for part in found]


def problems(sidecar: FlashMoeSidecar, original: Original | None) -> Iterator[tuple[str, str]]:
    """Read all of a sidecar: yields each tensor's name and what is wrong with it, or "".

    A tensor is held against its SHA-256, where the manifest has one, and against the original's. Of
    a GGUF original, so is the file of the other tensors that `export` writes beside. Raises
    ValueError where there is nothing to hold it against, and for an original of another form.
    """
    if original is None and any(entry.sha256 is None for entry in sidecar.entries):
        raise ValueError(
            f"[sidecar] {sidecar.path} has no checksums, name the model that its experts are of to"
            " compare them with (--model)."
        )
    places = {e.name: original.places(e) for e in sidecar.entries} if original is not None else {}
    for entry in sidecar.entries:
        yield entry.name, "; ".join(_wrong(sidecar, entry, original, places.get(entry.name, [])))
    dense = sidecar.path / DENSE
    if original is not None and original.checkpoint.metadata is not None and dense.is_file():
        yield DENSE, "; ".join(_wrong_dense(dense, original.checkpoint))


def _wrong(
    sidecar: FlashMoeSidecar, entry: Entry, original: Original | None, places: list[int]
) -> Iterator[str]:
    digest, different = hashlib.sha256(), []
    with ExitStack() as stack:
        file = stack.enter_context((sidecar.path / entry.file).open("rb"))
        if original is not None:
            reader = stack.enter_context(ExpertReader(original.source))
            layer = original.source.layers[entry.layer]
        for e in range(entry.shape[0]):
            file.seek(entry.offset + e * entry.stride)
            ours = file.read(entry.expert_bytes)
            digest.update(ours)
            if original is not None:
                parts = [(layer.of_expert(e)[i], layer.parts[i].nbytes) for i in places]
                if ours != b"".join(reader.read(*place, nbytes) for place, nbytes in parts):
                    different.append(e)
    if entry.sha256 is not None and digest.hexdigest() != entry.sha256:
        yield f"SHA-256 {digest.hexdigest()}, expected {entry.sha256}"
    if different:
        yield f"experts {show(different)} are not the model's"


def _wrong_dense(path: Path, original: Checkpoint) -> Iterator[str]:
    dense = Checkpoint.open(path)
    for name, info in dense.tensors.items():
        its = original.tensors.get(name)
        if its is None or (its.dtype, its.shape) != (info.dtype, info.shape):
            found = "none" if its is None else f"{its.dtype} {show(list(its.shape))}"
            mine = f"{info.dtype} {show(list(info.shape))}"
            yield f"{gguf_name(name)} is {mine}, the model has {found}"
        elif any(a != b for a, b in zip(chunks(dense, info), chunks(original, its), strict=True)):
            yield f"{gguf_name(name)} is not the model's"
    missing = [n for n in original.tensors if n not in dense.tensors and not is_expert(n)]
    if missing:
        yield f"{', '.join(map(gguf_name, missing))} missing"
