"""A model in a GGUF file or its shards: config, metadata, and where each tensor lies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..validation import show
from .gguf_config import config_from_gguf
from .gguf_header import GgufHeader, read_gguf_header
from .gguf_names import model_name
from .safetensors_header import TensorInfo, quoted

MAX_SHARDS = 65_535
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class GgufModel:
    """What GGUF files contain, validated as far as their headers tell.

    ``config`` is as the release has it, ``metadata`` that of the first shard. ``tensors`` have the
    model's names and, for types in blocks, ggml's; shapes are those of the values.
    """

    config: dict[str, Any]
    metadata: Mapping[str, Any]
    files: dict[str, int]
    tensors: dict[str, TensorInfo]


def open_gguf(path: Path) -> GgufModel:
    """Read the headers of a model whose first or only file is ``path``.

    Raises FileNotFoundError for a missing shard and ValueError, naming the file and the key or
    tensor, for anything malformed or inconsistent.
    """
    headers = list(_shards(path))
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        file = header.path.name
        for name, tensor in header.tensors.items():
            ours = model_name(name)
            if ours in tensors:
                raise ValueError(
                    f"[gguf] {header.path}: tensor {quoted(name)} is in {tensors[ours].file} too."
                )
            tensors[ours] = TensorInfo(
                file, tensor.type.name, tensor.shape, tensor.start, tensor.end
            )
    expected = _split(headers[0], "split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise ValueError(
            f"[gguf] {path}: key 'split.tensors.count' is {expected}, but its {len(headers)} files"
            f" have {len(tensors)} tensors."
        )
    if not tensors:
        raise ValueError(f"[gguf] {path} has no tensors.")
    metadata = headers[0].metadata
    files = {header.path.name: header.nbytes for header in headers}
    return GgufModel(config_from_gguf(path, metadata, tensors), metadata, files, tensors)


def _shards(path: Path) -> Iterator[GgufHeader]:
    """The headers of a model's files, each held against the first one's count."""
    first, named = read_gguf_header(path), _SHARD.fullmatch(path.name)
    yield first
    count = _split(first, "split.count", 1)
    in_name = 1 if named is None else int(named[3])
    if not 1 <= count <= MAX_SHARDS or count != in_name:
        raise ValueError(
            f"[gguf] {path}: key 'split.count' is {count}, expected {in_name} as in the file's name"
            f"{' (NAME-00001-of-0000N.gguf)' if named is None else ''}."
        )
    _check_number(first, 0, count)
    for i in range(1, count):
        assert named is not None
        shard = path.with_name(f"{named[1]}-{i + 1:05d}-of-{count:05d}{path.suffix}")
        if not shard.exists():
            raise FileNotFoundError(f"[gguf] {shard} is missing; {path.name} has {count} shards.")
        header = read_gguf_header(shard)
        _check_number(header, i, count)
        yield header


def _check_number(header: GgufHeader, number: int, count: int) -> None:
    for key, expected in (("split.no", number), ("split.count", count)):
        missing = 0 if key == "split.no" else 1  # as in a file that was never split
        if (found := _split(header, key, missing)) != expected:
            hint = "; name the first shard" if key == "split.no" and number == 0 else ""
            raise ValueError(
                f"[gguf] {header.path}: key {key!r} is {found}, expected {expected}{hint}."
            )


def _split(header: GgufHeader, key: str, default: int) -> int:
    found = header.metadata.get(key, default)
    if type(found) is not int or found < 0:
        raise ValueError(f"[gguf] {header.path}: key {key!r} is {show(found)}, expected a number.")
    return found
