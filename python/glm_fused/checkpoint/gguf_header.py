"""Reads and validates the header of a GGUF file; the file is untrusted, no tensor data is read."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..validation import MAX_SIZE, show
from .gguf_types import GGML_TYPES, GgmlType
from .safetensors_header import quoted, regular_file_size

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 100_000_000  # released vocabularies take some ten million
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 64
MAX_RANK = 4
MAX_ALIGNMENT = 1 << 20
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
_LEAST_ENTRY = 13  # bytes of a key of no characters, its type and a value
_LEAST_TENSOR = 33
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "B", 10: "Q", 11: "q",
           12: "d"}  # fmt: skip


class GgufTensor(NamedTuple):
    """A tensor as its header describes it.

    ``shape`` has the columns of a row last, ``start`` and ``end`` are offsets in the file.
    """

    type: GgmlType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """What one file says of itself.

    Values of ``metadata`` are int, float, bool, str, lists of str or bool, and NumPy arrays;
    ``places`` says from which byte to which the file has a key with its value.
    """

    path: Path
    nbytes: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    places: Mapping[str, tuple[int, int]]


def read_gguf_header(path: Path) -> GgufHeader:
    """The metadata and tensors of one file.

    Raises FileNotFoundError if there is no such file and ValueError, naming the file and the key or
    tensor with what was found and expected, if it is not a well-formed GGUF file of the size that
    its header says.
    """
    size = regular_file_size(path)
    with path.open("rb") as file:
        cursor = _Cursor(file, path, size)
        tensor_count, entry_count = _read_start(cursor)
        metadata: dict[str, Any] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(entry_count):
            first = cursor.position
            key = _read_entry(cursor, metadata)
            places[key] = first, cursor.position
        entries: dict[str, tuple[GgmlType, tuple[int, ...], int]] = {}
        for _ in range(tensor_count):
            _read_tensor(cursor, entries)
        alignment = _alignment(path, metadata)
        begin = -(-cursor.position // alignment) * alignment
    tensors = {
        name: _placed(path, name, kind, shape, (begin, offset), (alignment, size))
        for name, (kind, shape, offset) in entries.items()
    }
    _check_extents(path, tensors, begin, alignment, size)
    return GgufHeader(path, size, metadata, tensors, places)


class _Cursor:
    """Reads a file front to back; every length is held against what is left before it is used."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self._file, self._path, self.position = file, path, 0
        self.end, self.limit = min(size, MAX_HEADER_BYTES), "the file"
        if size > MAX_HEADER_BYTES:
            self.limit = f"the header, which has at most {MAX_HEADER_BYTES},"

    def fail(self, problem: str) -> ValueError:
        return ValueError(f"[gguf] {self._path}: {problem}")

    def check_room(self, what: str, nbytes: int) -> None:
        """Raise ValueError unless so many bytes are left."""
        if nbytes > self.end - self.position:
            raise self.fail(
                f"{what} at byte {self.position} takes {nbytes} bytes, but {self.limit} has"
                f" {self.end - self.position} left (truncated?)."
            )

    def take(self, what: str, nbytes: int) -> bytes:
        self.check_room(what, nbytes)
        found = self._file.read(nbytes)
        if len(found) != nbytes:
            raise self.fail(f"{what}: {len(found)} bytes were read, expected {nbytes}.")
        self.position += nbytes
        return found

    def number(self, what: str, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(what, struct.calcsize(f"<{code}")))[0]

    def text(self, what: str, longest: int = MAX_HEADER_BYTES) -> str:
        length = self.number(what, "Q")
        if length > longest:
            raise self.fail(f"{what} has {length} bytes, expected at most {longest}.")
        raw = self.take(what, length)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: byte {error.start} is wrong.") from None


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of entries of metadata."""
    if (magic := cursor.take("the magic", 4)) != MAGIC:
        raise cursor.fail(f"begins with {magic!r}, expected {MAGIC!r}.")
    version = cursor.number("the version", "I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        found = "of big-endian numbers" if swapped else version
        expected = " or ".join(map(str, VERSIONS))
        raise cursor.fail(f"version is {found}, expected {expected}.")
    tensors, entries = cursor.number("tensor_count", "Q"), cursor.number("kv_count", "Q")
    cursor.check_room(f"kv_count {entries}: metadata", entries * _LEAST_ENTRY)
    cursor.check_room(f"tensor_count {tensors}: what it counts", tensors * _LEAST_TENSOR)
    return tensors, entries


def _read_entry(cursor: _Cursor, metadata: dict[str, Any]) -> str:
    """Read a key and its value; returns the key."""
    key = cursor.text(f"key {len(metadata)} of the metadata", MAX_KEY_BYTES)
    what = f"key {quoted(key)}"
    if key in metadata:
        raise cursor.fail(f"{what} is there twice.")
    kind = cursor.number(f"the type of {what}", "I")
    metadata[key] = _array(cursor, what) if kind == ARRAY else _scalar(cursor, what, kind)
    return key


def _scalar(cursor: _Cursor, what: str, kind: int) -> Any:
    if kind == STRING:
        return cursor.text(what)
    if kind not in NUMBERS:
        raise cursor.fail(f"{what} has type {kind}, expected 0 to 12.")
    value = cursor.number(what, NUMBERS[kind])
    if kind != BOOL:
        return value
    if value > 1:
        raise cursor.fail(f"{what} is the boolean {value}, expected 0 or 1.")
    return bool(value)


def _array(cursor: _Cursor, what: str) -> Any:
    """A list of str or bool, or a NumPy array of numbers."""
    kind, count = cursor.number(f"the type of {what}", "I"), cursor.number(f"{what}: length", "Q")
    if kind == STRING:
        cursor.check_room(f"{what}, of {count} strings,", 8 * count)
        return [cursor.text(what) for _ in range(count)]
    if kind not in NUMBERS:
        found = "arrays" if kind == ARRAY else f"type {kind}"
        raise cursor.fail(f"{what} is an array of {found}, expected numbers or strings.")
    dtype = np.dtype(f"<{NUMBERS[kind]}")
    values = np.frombuffer(cursor.take(what, count * dtype.itemsize), dtype)
    if kind != BOOL:
        return values
    if (values > 1).any():
        raise cursor.fail(f"{what} has the boolean {values.max()}, expected 0 or 1.")
    return values.astype(bool).tolist()


def _read_tensor(
    cursor: _Cursor, entries: dict[str, tuple[GgmlType, tuple[int, ...], int]]
) -> None:
    """One tensor's entry: its type, its shape with rows before columns, and its offset."""
    name = cursor.text(f"the name of tensor {len(entries)}", MAX_NAME_BYTES)
    what = f"tensor {quoted(name)}"
    if not name:
        raise cursor.fail(f"tensor {len(entries)} has no name.")
    if name in entries:
        raise cursor.fail(f"{what} is there twice.")
    rank = cursor.number(f"{what}: number of dimensions", "I")
    if not 1 <= rank <= MAX_RANK:
        raise cursor.fail(f"{what} has {rank} dimensions, expected 1 to {MAX_RANK}.")
    sizes = [cursor.number(f"{what}: dimension {i}", "Q") for i in range(rank)]
    if not all(1 <= size <= MAX_SIZE for size in sizes):
        raise cursor.fail(f"{what} has dimensions {sizes}, expected each from 1 to {MAX_SIZE}.")
    number = cursor.number(f"{what}: type", "I")
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise cursor.fail(f"{what} has type {number}, expected one that ggml has.")
    if sizes[0] % kind.columns:
        raise cursor.fail(
            f"{what} has rows of {sizes[0]}, expected a multiple of {kind.columns} for {kind.name}."
        )
    entries[name] = kind, tuple(reversed(sizes)), cursor.number(f"{what}: offset", "Q")


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    found = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    if type(found) is not int or not 1 <= found <= MAX_ALIGNMENT or found & (found - 1):
        raise ValueError(
            f"[gguf] {path}: key {ALIGNMENT!r} is {show(found)}, expected a power of two up to"
            f" {MAX_ALIGNMENT}."
        )
    return found


def _placed(
    path: Path,
    name: str,
    kind: GgmlType,
    shape: tuple[int, ...],
    place: tuple[int, int],
    bounds: tuple[int, int],
) -> GgufTensor:
    """The tensor at an offset from the beginning of the data, within an aligned file."""
    (begin, offset), (alignment, size) = place, bounds
    what = f"[gguf] {path}: tensor {quoted(name)}"
    if offset % alignment:
        raise ValueError(
            f"{what} has offset {offset}, expected a multiple of {alignment}, the alignment."
        )
    nbytes = math.prod(shape) // kind.columns * kind.nbytes
    end = begin + offset + nbytes
    if end > size:
        raise ValueError(
            f"{what}, {kind.name} {list(shape)}, ends at byte {end}, but the file has {size} bytes"
            " (truncated?)."
        )
    return GgufTensor(kind, shape, begin + offset, end)


def _check_extents(
    path: Path, tensors: Mapping[str, GgufTensor], begin: int, alignment: int, size: int
) -> None:
    """Tensors follow one another, apart by what alignment needs, up to the end of the file."""
    position, previous = begin, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start != position:
            kind = "overlaps" if tensor.start < position else "leaves a gap after"
            raise ValueError(
                f"[gguf] {path}: tensor {quoted(name)} {kind} {previous}: it begins at byte"
                f" {tensor.start}, expected {position}."
            )
        position, previous = -(-tensor.end // alignment) * alignment, f"tensor {quoted(name)}"
    if size > position:
        raise ValueError(
            f"[gguf] {path} has {size} bytes, expected at most {position}: its header names no"
            " tensor for the rest."
        )
