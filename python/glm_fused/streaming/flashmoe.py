"""Flash-MoE's sidecar, version 1: files of routed experts' GGUF blocks, and a manifest.

Each file holds the tensors of one layer, whole or expert by expert, without header or padding. The
model is a GGUF file that may lack those tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint.folder import Checkpoint, read_json
from ..checkpoint.gguf_formats import format_of
from ..checkpoint.safetensors_header import NAMES, TensorInfo, regular_file_size
from ..formats.weights import plane_shape
from ..models.config import ModelArgs
from ..models.layer_spec import DECODER
from ..models.tensors import PROJECTIONS
from ..validation import show
from .flashmoe_manifest import FAMILIES, Entry, read_entries
from .sidecar import MANIFEST, check_finished
from .source import ExpertSource, LayerExperts, Part


@dataclass(frozen=True)
class FlashMoeSidecar:
    """A manifest that was read; ``files`` gives the size of each file that it names."""

    path: Path
    entries: tuple[Entry, ...]
    files: dict[str, int]

    @classmethod
    def open(cls, path: Path) -> FlashMoeSidecar:
        """Read the manifest in a folder, and check that all tensors lie in its files, apart.

        Raises FileNotFoundError for a missing file and ValueError, naming the manifest's entry with
        what was found and expected, for anything else.
        """
        manifest = path / MANIFEST
        document = read_json(manifest)
        try:
            entries = tuple(read_entries(document))
            names = dict.fromkeys(entry.file for entry in entries)
            files = {name: regular_file_size(_inside(path, name)) for name in names}
            _check_extents(entries, files)
        except ValueError as error:
            raise ValueError(f"[sidecar] {manifest}: {error}.") from None
        return cls(path, entries, files)

    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors under the model's names, as if they were in a file of the checkpoint."""
        return {
            e.model_name: TensorInfo(
                str(self.path / e.file),
                e.type.name,
                e.shape,
                e.offset,
                e.offset + e.shape[0] * e.expert_bytes,
            )
            for e in self.entries
        }

    def source(self, args: ModelArgs) -> ExpertSource:
        """Where the experts lie; the tensors have to have passed the checks of a checkpoint's.

        Raises ValueError, naming the manifest, for a layer of the decoder that lacks some.
        """
        files = {self.path / name: size for name, size in self.files.items()}
        index = {name: i for i, name in enumerate(self.files)}
        layers = {}
        for spec in args.model_layers:
            mine = [entry for entry in self.entries if entry.layer == spec.index]
            if spec.is_sparse and (mine or spec.role == DECODER):
                found = {p for entry in mine for p in FAMILIES[entry.family]}
                if missing := [p for p in PROJECTIONS if p not in found]:
                    raise ValueError(
                        f"[sidecar] {self.path / MANIFEST}: layer {spec.index} has no entry of"
                        f" {', '.join(missing)}."
                    )
                layers[spec.index] = _layer_experts(mine, index)
        return ExpertSource("flash-moe sidecar", files, layers)


def is_flashmoe(path: Path) -> bool:
    """Whether a folder holds a manifest of this kind; errors are those of reading it."""
    return (path / MANIFEST).is_file() and "sidecar_kind" in read_json(path / MANIFEST)


def with_experts(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint with the tensors of a Flash-MoE sidecar in ``path``; else as it is.

    Raises ValueError, naming the tensor, where the checkpoint has one of another type or shape, and
    for a checkpoint that is not GGUF; FileNotFoundError for a folder that is no sidecar.
    """
    check_finished(path)
    if not is_flashmoe(path):
        return checkpoint
    if checkpoint.metadata is None:
        raise ValueError(
            f"[sidecar] {path} holds GGUF blocks, but {checkpoint.path} is a folder, expected the"
            " GGUF file of the model's other tensors."
        )
    tensors = FlashMoeSidecar.open(path).tensors()
    for name, mine in tensors.items():
        its = checkpoint.tensors.get(name)
        if its is not None and (its.dtype, its.shape) != (mine.dtype, mine.shape):
            raise ValueError(
                f"[sidecar] {path}: {name} is {mine.dtype} {list(mine.shape)}, but"
                f" {checkpoint.path} has {its.dtype} {list(its.shape)}."
            )
    return replace(checkpoint, tensors=tensors | checkpoint.tensors)


def parts_of(entry: Entry) -> list[Part]:
    """What an expert has in a tensor whose type is a format, in the order of the bytes."""
    fmt = format_of(entry.type.name)
    assert fmt is not None  # it was checked
    plane, projections = fmt.planes[0], FAMILIES[entry.family]
    _, rows, columns = entry.shape
    shape = plane_shape(fmt, plane, (rows // len(projections), columns))
    return [Part(f"{p}.weight", NAMES[plane.dtypes[0]], shape) for p in projections]


def _layer_experts(entries: list[Entry], index: dict[str, int]) -> LayerExperts:
    parts: dict[str, Part] = {}
    places: dict[str, list[tuple[int, int]]] = {}
    for entry in entries:
        for i, part in enumerate(parts_of(entry)):
            projection = FAMILIES[entry.family][i]
            first = entry.offset + i * part.nbytes
            parts[projection] = part
            places[projection] = [
                (index[entry.file], first + e * entry.stride) for e in range(entry.shape[0])
            ]
    experts = len(places[PROJECTIONS[0]])
    locations = tuple(places[p][e] for e in range(experts) for p in PROJECTIONS)
    return LayerExperts(tuple(parts[p] for p in PROJECTIONS), locations)


def _inside(folder: Path, name: str) -> Path:
    """The file, which no link may lead out of the folder.

    The Hub's cache is the exception: its snapshots are links to files in a folder beside them.
    """
    file, allowed = (folder / name).resolve(), [folder.resolve()]
    allowed += [p.parent / "blobs" for p in allowed[0].parents if p.name == "snapshots"]
    if not any(file.is_relative_to(place) for place in allowed):
        raise ValueError(f"repacked_file {show(name)} leads out of the folder")
    return folder / name


def _check_extents(entries: tuple[Entry, ...], files: dict[str, int]) -> None:
    """Raise ValueError unless every expert lies in its file, and none over another."""
    for entry in entries:
        end = entry.offset + (entry.shape[0] - 1) * entry.stride + entry.expert_bytes
        if end > files[entry.file]:
            raise ValueError(
                f"{entry.name} ends at byte {end} of {entry.file}, which has {files[entry.file]}"
                " (truncated?)"
            )
    places = sorted(
        (entry.file, entry.offset + e * entry.stride, entry.expert_bytes, entry.name, e)
        for entry in entries
        for e in range(entry.shape[0])
    )
    last_file, last_end, last_name = "", 0, ""
    for file, begin, nbytes, name, expert in places:
        what = f"expert {expert} of {name}"
        if file == last_file and begin < last_end:
            raise ValueError(f"{what} overlaps {last_name} in {file}")
        last_file, last_end, last_name = file, begin + nbytes, what
