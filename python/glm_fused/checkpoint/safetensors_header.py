"""Reads and validates the header of a safetensors file; the file is untrusted, no data is read."""

import json
import math
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..validation import show

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_RANK = 8
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
DTYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}  # of the planes of weights
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorInfo(NamedTuple):
    """A tensor as its header describes it; ``start`` and ``end`` are offsets in the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, by name.

    Raises FileNotFoundError if there is no such file and ValueError, naming file and tensor, if it
    is not a well-formed safetensors file of the size that its header says.
    """
    size = regular_file_size(path)
    header, data_start = _read_json(path, size)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"[safetensors] {path}: __metadata__ must map strings to strings.")
    tensors = {}
    for name, entry in header.items():
        try:
            tensors[name] = _tensor(path.name, entry, data_start, size)
        except ValueError as error:
            raise ValueError(f"[safetensors] {path}: tensor {quoted(name)} {error}") from None
    _check_extents(path, tensors, data_start, size)
    return tensors


def regular_file_size(path: Path) -> int:
    """The size of a file; refuses folders, pipes and devices, which could block a read."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"[safetensors] {path}: no such file.") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"[safetensors] {path} is not a regular file.")
    return status.st_size


def quoted(name: str) -> str:
    """An untrusted name for an error message: whole unless it is absurdly long, escaped."""
    return repr(name) if len(name) <= 200 else show(name)


def parse_json_object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, from untrusted bytes; ``what`` begins the error."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8: byte {error.start} is wrong.") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        long = "integer string conversion" in str(error)  # CPython's limit
        problem = "a number of thousands of digits" if long else error
        raise ValueError(f"{what} is not valid JSON: {problem}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, found a {type(value).__name__}.")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {quoted(duplicate)}")
    return result


def _read_json(path: Path, size: int) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise ValueError(f"[safetensors] {path} is truncated: {size} bytes, expected at least 8.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"[safetensors] {path}: header of {length} bytes, expected at most"
                f" {MAX_HEADER_BYTES} (not a safetensors file?)."
            )
        if length > size - 8:
            raise ValueError(
                f"[safetensors] {path} is truncated: {size} bytes, expected at least"
                f" {length + 8} for its header."
            )
        text = file.read(length)
    return parse_json_object(text, f"[safetensors] {path}: header"), 8 + length


def _tensor(file: str, entry: Any, data_start: int, file_size: int) -> TensorInfo:
    """One header entry, checked by itself; ValueErrors are worded to follow the tensor's name."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"must have exactly dtype, shape and data_offsets, found {show(entry)}.")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"has dtype {show(dtype)}, expected one of {', '.join(ITEM_BYTES)}.")
    shape = _sizes("shape", entry["shape"])
    if len(shape) > MAX_RANK:
        raise ValueError(f"has {len(shape)} dimensions, expected at most {MAX_RANK}.")
    offsets = _sizes("data_offsets", entry["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has data_offsets {show(offsets)}, expected [begin, end].")
    begin, end = offsets
    if end > file_size - data_start:
        raise ValueError(
            f"ends at byte {show(data_start + end)}, but the file has {file_size} bytes"
            " (truncated?)."
        )
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise ValueError(
            f"holds {end - begin} bytes, expected {show(expected)} for {dtype} {show(shape)}."
        )
    return TensorInfo(file, dtype, shape, data_start + begin, data_start + end)


def _sizes(key: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, list) and all([type(v) is int and v >= 0 for v in values]):
        return tuple(values)
    raise ValueError(f"has {key} {show(values)}, expected a list of sizes.")


def _check_extents(path: Path, tensors: dict[str, TensorInfo], start: int, file_size: int) -> None:
    """Each byte of data belongs to exactly one tensor."""
    position, previous = start, "the header"
    for name, info in _by_offset(tensors):
        if info.start != position:
            kind = "overlaps" if info.start < position else "leaves a gap after"
            raise ValueError(
                f"[safetensors] {path}: tensor {quoted(name)} {kind} {previous}: it begins at byte"
                f" {info.start}, expected {position}."
            )
        position, previous = info.end, quoted(name)
    if position != file_size:
        raise ValueError(
            f"[safetensors] {path} has {file_size} bytes, expected {position}: its header names no"
            " tensor for the rest."
        )


def _by_offset(tensors: dict[str, TensorInfo]) -> Iterable[tuple[str, TensorInfo]]:
    return sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end))
