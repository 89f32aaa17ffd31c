"""Where the tensors of every routed expert lie on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ..checkpoint.folder import Checkpoint
from ..checkpoint.safetensors_header import ITEM_BYTES, TensorInfo
from ..formats.weights import Format, infer_format
from ..models.config import ModelArgs
from ..models.tensors import PROJECTIONS

STREAMED = ("BF16", "F16", "F32", "U32", "U8")
LEAVES = ("weight", "scales", "biases")


class Part(NamedTuple):
    """One tensor of an expert: ``gate_proj.weight`` and so on, as stored."""

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

    def of_expert(self, expert: int) -> Sequence[tuple[int, int]]:
        """Where the parts of one expert lie."""
        first = expert * len(self.parts)
        return self.locations[first : first + len(self.parts)]

    def format(self, projection: str, columns: int) -> Format | None:
        """How a projection of ``columns`` inputs is packed; None if it is dense."""
        found = {part.name: part for part in self.parts}
        scales = found.get(f"{projection}.scales")
        if scales is None:
            return None
        packed = found[f"{projection}.weight"].shape[-1]
        uint8 = scales.dtype == "U8"
        return infer_format(projection, columns, packed, scales.shape[-1], uint8)


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


def is_expert(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to a routed expert."""
    return ".mlp.switch_mlp." in name or ".mlp.experts." in name


def checkpoint_source(checkpoint: Checkpoint, args: ModelArgs) -> ExpertSource:
    """The experts in a checkpoint's own shards, in any layout that needs no conversion.

    Raises ValueError for FP8 experts, whose blocks the kernels do not take.
    """
    files = {checkpoint.path / name: size for name, size in checkpoint.files.items()}
    index = {name: i for i, name in enumerate(checkpoint.files)}
    layers = {}
    for i in range(args.num_hidden_layers):
        if args.is_sparse(i):
            layers[i] = _layer(checkpoint.tensors, f"model.layers.{i}.mlp", args, index)
    return ExpertSource("safetensors", files, layers)


def _layer(
    tensors: Mapping[str, TensorInfo], prefix: str, args: ModelArgs, index: Mapping[str, int]
) -> LayerExperts:
    experts = args.n_routed_experts or 0
    parts: list[Part] = []
    columns: list[list[tuple[int, int]]] = []  # per part, the location of every expert
    for projection in PROJECTIONS:
        for leaf in LEAVES:
            found = _find(tensors, prefix, f"{projection}.{leaf}", experts)
            if found is None:
                continue
            infos, shape, strides = found
            dtype = infos[0].dtype
            if dtype not in STREAMED or f"{prefix}.experts.0.{projection}.weight_scale_inv" in (
                tensors
            ):
                raise ValueError(
                    f"[slots] {prefix} has {dtype} experts, which cannot be streamed; convert the"
                    " checkpoint with mlx_lm.convert."
                )
            parts.append(Part(f"{projection}.{leaf}", dtype, shape))
            columns.append(
                [(index[t.file], t.start + s) for t, s in zip(infos, strides, strict=True)]
            )
    locations = tuple(column[e] for e in range(experts) for column in columns)
    return LayerExperts(tuple(parts), locations)


_Found = tuple[list[TensorInfo], tuple[int, ...], list[int]]


def _find(tensors: Mapping[str, TensorInfo], prefix: str, name: str, experts: int) -> _Found | None:
    """Per expert the tensor that holds it and where in it; with the shape of one expert's part."""
    stacked = tensors.get(f"{prefix}.switch_mlp.{name}")
    projection, _, leaf = name.partition(".")
    if stacked is None and leaf == "weight" and projection == "down_proj":
        stacked = tensors.get(f"{prefix}.experts.down_proj")
    if stacked is not None:
        size = stacked.nbytes // experts
        return [stacked] * experts, stacked.shape[1:], [e * size for e in range(experts)]
    fused = tensors.get(f"{prefix}.experts.gate_up_proj")
    if fused is not None and leaf == "weight":
        size, half = fused.nbytes // experts, fused.nbytes // experts // 2
        first = half if projection == "up_proj" else 0
        shape = (fused.shape[1] // 2, *fused.shape[2:])
        return [fused] * experts, shape, [e * size + first for e in range(experts)]
    if f"{prefix}.experts.0.{name}" not in tensors:
        return None
    infos = [tensors[f"{prefix}.experts.{e}.{name}"] for e in range(experts)]
    return infos, infos[0].shape, [0] * experts
