"""Writes GGUF files, version 3: metadata, and tensors whose bytes come from anywhere."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .gguf_header import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, NUMBERS, STRING
from .gguf_types import NUMBERS_BY_NAME, GgmlType
from .writing import new_file

_VERSION = 3
_UINT32, _FLOAT32 = 4, 6
_KINDS = {np.dtype(f"<{code}"): kind for kind, code in NUMBERS.items() if kind != BOOL}


class NewTensor(NamedTuple):
    """A tensor to write; ``shape`` has the columns of a row last."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.columns * self.type.nbytes


Contents = Callable[[NewTensor], Iterable[bytes]]


def encode_entry(key: str, value: Any) -> bytes:
    """A key of the metadata with its value.

    A Python int is uint32, a float float32; NumPy scalars and arrays are of their own types. Lists
    are of str or bool, and not empty.
    """
    kind, encoded = _encode(value)
    return _text(key) + struct.pack("<I", kind) + encoded


def write_gguf(
    file: BinaryIO,
    entries: Sequence[bytes],
    tensors: Sequence[NewTensor],
    contents: Contents,
    alignment: int = DEFAULT_ALIGNMENT,
) -> None:
    """Write metadata ``entries``, as `encode_entry` gives them, and ``tensors``.

    ``contents`` gives a tensor's bytes, in pieces. ``alignment`` is what the metadata say of it.
    """
    header = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(entries)), *entries]
    offset = 0
    for tensor in tensors:
        header.append(_info(tensor, offset))
        offset += -(-tensor.nbytes // alignment) * alignment
    written = sum(file.write(part) for part in header)
    file.write(bytes(-written % alignment))
    for tensor in tensors:
        nbytes = sum(file.write(piece) for piece in contents(tensor))
        assert nbytes == tensor.nbytes, tensor
        file.write(bytes(-nbytes % alignment))


def shard_path(path: Path, number: int, count: int) -> Path:
    """What the shard ``number``, from 0 on, of ``count`` is called; of one, ``path`` itself."""
    if count == 1:
        return path
    return path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}{path.suffix}")


def write_shards(
    path: Path,
    keys: Mapping[str, Any],
    shards: Sequence[Sequence[NewTensor]],
    contents: Contents,
) -> list[Path]:
    """Write a model with metadata ``keys`` to a file or its shards; returns their paths.

    They have their names once all are whole, the first one last.
    """
    count = len(shards)
    paths = [shard_path(path, i, count) for i in range(count)]
    total = sum(map(len, shards))
    with ExitStack() as stack:
        files = [stack.enter_context(new_file(path)) for path in paths]
        for i, (file, tensors) in enumerate(zip(files, shards, strict=True)):
            own: dict[str, Any] = dict(keys) if i == 0 else {}
            if count > 1:
                own |= {"split.no": np.uint16(i), "split.count": np.uint16(count)}
                own["split.tensors.count"] = np.int32(total)
            write_gguf(file, [encode_entry(*item) for item in own.items()], tensors, contents)
    return paths


def _info(tensor: NewTensor, offset: int) -> bytes:
    rank = len(tensor.shape)
    sizes = struct.pack(f"<I{rank}Q", rank, *reversed(tensor.shape))
    number = NUMBERS_BY_NAME[tensor.type.name]
    return _text(tensor.name) + sizes + struct.pack("<IQ", number, offset)


def _encode(value: Any) -> tuple[int, bytes]:
    """The number of a value's type, and its bytes."""
    if isinstance(value, np.ndarray):
        body = struct.pack("<IQ", _KINDS[value.dtype], len(value)) + value.tobytes()
        return ARRAY, body
    if isinstance(value, list):
        items = [_encode(item) for item in value]
        body = struct.pack("<IQ", items[0][0], len(items)) + b"".join(item for _, item in items)
        return ARRAY, body
    if isinstance(value, np.generic):
        return _KINDS[value.dtype], value.tobytes()
    if isinstance(value, str):
        return STRING, _text(value)
    if isinstance(value, bool):
        return BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    return _FLOAT32, struct.pack("<f", value)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
