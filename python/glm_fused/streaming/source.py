"""Where the tensors of every routed expert lie on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ..checkpoint.folder import Checkpoint
from ..checkpoint.gguf_formats import format_of
from ..checkpoint.parts import Rows, unit_of
from ..checkpoint.safetensors_header import DTYPES, ITEM_BYTES, NAMES, TensorInfo
from ..checkpoint.stored import OTHER_NAMES
from ..formats.weights import FORMATS, FP8, FP8_BLOCK, PLANES, Format, plane_shape
from ..models.config import ModelArgs
from ..models.layer_spec import LayerSpec
from ..models.tensors import PROJECTIONS, Form, Module, expert_modules

# The formats whose planes have other names on disk, by a tensor that no other has.
_BY_SCALES = {"weight_scale_2": FORMATS["nvfp4-global"], "weight_scale_inv": FP8}


class Part(NamedTuple):
    """One tensor of an expert: ``gate_proj.weight`` and so on, as kernels read what is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer; ``locations`` is (file, offset) per expert and part, in order.

    ``checksums`` has one number per expert where the source knows them.
    """

    parts: tuple[Part, ...]
    locations: tuple[tuple[int, int], ...]
    checksums: tuple[int, ...] = ()

    @property
    def experts(self) -> int:
        return len(self.locations) // len(self.parts)

    @property
    def expert_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def part(self, modules: Mapping[str, Module], rows: Mapping[str, slice]) -> LayerExperts:
        """The experts with these rows of each projection alone, whose ``modules`` are theirs.

        Raises ValueError, naming the tensor, where rows share a row of scales with others.
        """
        parts, moves = [], []
        for part in self.parts:
            projection = part.name.partition(".")[0]
            module, wanted = modules[projection], rows[projection]
            name = f"{module.path}.{part.name.partition('.')[2]}"
            unit = unit_of(name, part.shape, Rows(1, module.shape[1], (wanted,)))
            first, stop = (0, 0) if unit is None else (wanted.start // unit, wanted.stop // unit)
            row_bytes = 0 if unit is None else part.nbytes // part.shape[0]
            shape = part.shape if unit is None else (stop - first, *part.shape[1:])
            parts.append(part._replace(shape=shape))
            moves.append(first * row_bytes)
        places = zip(self.locations, moves * self.experts, strict=True)
        return LayerExperts(tuple(parts), tuple((file, at + move) for (file, at), move in places))

    def of_expert(self, expert: int) -> Sequence[tuple[int, int]]:
        """Where the parts of one expert lie."""
        first = expert * len(self.parts)
        return self.locations[first : first + len(self.parts)]


@dataclass(frozen=True)
class ExpertSource:
    """All routed experts of a model, by layer, and the files (with their sizes) they are in.

    A new kind of source is a function that returns one of these: each part of an expert has to be
    one contiguous range of a file, of the same size and type for all experts of a layer.
    """

    kind: str
    files: Mapping[Path, int]
    layers: Mapping[int, LayerExperts]

    @property
    def nbytes(self) -> int:
        return sum(layer.experts * layer.expert_bytes for layer in self.layers.values())

    def of_layers(self, layers: Container[int]) -> ExpertSource:
        """The experts of some layers alone, and the files that have them."""
        kept = {i: layer for i, layer in self.layers.items() if i in layers}
        used = {file for layer in kept.values() for file, _ in layer.locations}
        files = {path: n for i, (path, n) in enumerate(self.files.items()) if i in used}
        places = {file: place for place, file in enumerate(sorted(used))}
        return ExpertSource(self.kind, files, {i: _moved(la, places) for i, la in kept.items()})

    def part(self, args: ModelArgs, parts: Mapping[str, slice]) -> ExpertSource:
        """The experts with the rows alone that ``parts`` has of their modules.

        Raises ValueError, naming the tensor, where rows share a row of scales with others.
        """
        layers = {}
        for i, layer in self.layers.items():
            modules = expert_modules(args, args.model_layers[i])
            found = dict(zip(PROJECTIONS, modules, strict=True))
            layers[i] = layer.part(found, {name: parts[m.path] for name, m in found.items()})
        return ExpertSource(self.kind, self.files, layers)

    def joined(self, other: ExpertSource) -> ExpertSource:
        """This source with the layers of another, which stay in that one's files."""
        files = {**self.files, **other.files}
        numbers = {path: i for i, path in enumerate(files)}
        places = {i: numbers[path] for i, path in enumerate(other.files)}
        layers = {i: _moved(layer, places) for i, layer in other.layers.items()}
        return ExpertSource(self.kind, files, {**self.layers, **layers})


def _moved(layer: LayerExperts, places: Mapping[int, int]) -> LayerExperts:
    """A layer whose files have other numbers."""
    return replace(layer, locations=tuple((places[file], at) for file, at in layer.locations))


class ExpertReader:
    """Reads experts of a source with ordinary reads; a context manager that closes its files.

    Files are opened when they are first read from. Several threads may not share one.
    """

    def __init__(self, source: ExpertSource) -> None:
        self._paths = list(source.files)
        self._open: dict[int, int] = {}

    def __enter__(self) -> ExpertReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """Bytes ``offset`` to ``offset + nbytes`` of the source's file number ``file``.

        Raises OSError, naming the file, where reading fails and ValueError where the file ends.
        """
        path = self._paths[file]
        try:
            if file not in self._open:
                self._open[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            blocks, left = [], nbytes
            while left:
                block = os.pread(self._open[file], left, offset + nbytes - left)
                if not block:
                    raise ValueError(f"[sidecar] {path} ends before byte {offset + nbytes}.")
                blocks.append(block)
                left -= len(block)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def expert(self, layer: LayerExperts, expert: int) -> list[bytes]:
        """The parts of one expert, in order; errors are those of ``read``."""
        return [
            self.read(file, offset, part.nbytes)
            for part, (file, offset) in zip(layer.parts, layer.of_expert(expert), strict=True)
        ]


def checkpoint_source(
    checkpoint: Checkpoint, args: ModelArgs, layers: Sequence[LayerSpec]
) -> ExpertSource:
    """The experts of ``layers`` in a checkpoint's own files, in layouts that need no conversion.

    Raises ValueError for experts in a form that kernels do not read as it lies on disk.
    """
    files = {checkpoint.folder / name: size for name, size in checkpoint.files.items()}
    index = {name: i for i, name in enumerate(checkpoint.files)}
    found = {
        layer.index: _layer(checkpoint.tensors, expert_modules(args, layer), index)
        for layer in layers
        if layer.is_sparse
    }
    kind = "safetensors" if checkpoint.metadata is None else "gguf"
    return ExpertSource(kind, files, found)


def _layer(
    tensors: Mapping[str, TensorInfo], modules: Sequence[Module], index: Mapping[str, int]
) -> LayerExperts:
    parts: list[Part] = []
    columns: list[list[tuple[int, int]]] = []  # per part, the location of every expert
    for module in modules:
        form, projection = module.form_in(tensors), module.path.rpartition(".")[2]
        names = [f"{path}{{}}" for path in form.paths(module.experts)]
        _check_streamable(tensors, form, module)
        fmt = _format_on_disk(tensors, names[0], form)
        for leaf in PLANES:
            suffixes = [f".{other}" for other in (leaf, *OTHER_NAMES.get(leaf, ()))]
            if leaf == "weight":
                suffixes = [form.suffix]
            stored = [n.format(suffix) for n in names for suffix in suffixes]
            found = [tensors[name] for name in stored if name in tensors]
            if not found:
                continue
            shape, places = _places(found, form, module)
            part = Part(f"{projection}.{leaf}", found[0].dtype, shape)
            parts.append(part if fmt is None else _plane(part, leaf, fmt, module))
            columns.append([(index[info.file], at) for info, at in places])
    locations = tuple(column[e] for e in range(modules[0].experts) for column in columns)
    return LayerExperts(tuple(parts), locations)


def _format_on_disk(tensors: Mapping[str, TensorInfo], name: str, form: Form) -> Format | None:
    """The format of a weight whose planes have other types or names on disk, else None."""
    info = tensors.get(name.format(form.suffix))
    if info is not None and info.dtype not in ITEM_BYTES:
        return format_of(info.dtype)  # GGUF's blocks
    for scales, fmt in _BY_SCALES.items():
        if name.format(f".{scales}") in tensors:
            return fmt
    return None


def _plane(part: Part, leaf: str, fmt: Format, module: Module) -> Part:
    """The part as a plane of the format, which has the same bytes."""
    plane = next(plane for plane in fmt.planes if plane.name == leaf)
    dtype = part.dtype if len(plane.dtypes) > 1 else NAMES[plane.dtypes[0]]
    return Part(part.name, dtype, plane_shape(fmt, plane, module.shape[1:]))


def _check_streamable(tensors: Mapping[str, TensorInfo], form: Form, module: Module) -> None:
    """Raise ValueError for experts in a form that kernels do not read as it lies on disk."""
    first, layer = next(form.paths(1)), module.path.partition(".switch_mlp.")[0]
    if f"{first}.weight_packed" in tensors:
        raise ValueError(
            f"[slots] {layer} has experts of compressed-tensors, which cannot be streamed: the"
            " biases that kernels read are not in its files; convert the checkpoint with"
            " `glm-fused convert`."
        )
    dtype, columns = tensors[first + form.suffix].dtype, module.shape[-1]
    fp8 = f"{first}.weight_scale_inv" in tensors
    if fp8 and columns % FP8_BLOCK:
        raise ValueError(
            f"[slots] {layer} has FP8 experts of {columns} columns, expected a multiple of"
            f" {FP8_BLOCK} to stream them."
        )
    blocks = dtype not in ITEM_BYTES  # of GGUF; that they are of a known format was checked
    if not blocks and dtype not in DTYPES and not fp8 and f"{first}.weight_scale_2" not in tensors:
        raise ValueError(
            f"[slots] {layer} has {dtype} experts, which cannot be streamed; convert the"
            " checkpoint with `glm-fused convert`."
        )


def _places(
    found: Sequence[TensorInfo], form: Form, module: Module
) -> tuple[tuple[int, ...], list[tuple[TensorInfo, int]]]:
    """The shape of one expert's part, and per expert its tensor and where in the file it begins."""
    if form.of_single_experts:
        return found[0].shape, [(info, info.start) for info in found]
    (info,) = found
    stride, (_, rows, _), shared_rows = info.nbytes // module.experts, module.shape, form.shape[1]
    first = info.start + stride // shared_rows * form.first_row
    shape = (rows, *info.shape[2:])
    return shape, [(info, first + e * stride) for e in range(module.experts)]
