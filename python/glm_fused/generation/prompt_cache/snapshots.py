"""Blocks of prompts in a folder, one file each, which outlive the process.

A file is a safetensors file. Its metadata say of which program, model and format its rows are,
which block it follows, and its tokens; the checksum is over all bytes of the file, with zeros in
its own place. A file gets its name, which is the block's id, once it is whole and on disk. One
process at a time has a folder, by a lock that ends with the process.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from ... import _ext
from ...checkpoint.writing import new_file
from ...environment import logger
from ...validation import show
from .blocks import Block, as_tokens, block_id, root
from .rows import Rows

VERSION = 1  # of the files; raise it where their form or the meaning of their rows changes
LOCK = "lock"
_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.safetensors\.[0-9a-f]{16}\.tmp")
_NO_CHECKSUM = "0" * 16


@dataclass(frozen=True)
class Identity:
    """What rows are of; rows of anything else give other logits or none.

    Attributes:
        model: a digest of config and weights (`glm_fused.checkpoint.identity`).
        kv_format: the model's.
        block_tokens: how many tokens a block has.
    """

    model: str
    kv_format: str
    block_tokens: int

    def describe(self) -> dict[str, str]:
        """Everything that has to be the same, by a name for people."""
        device = "gpu" if mx.default_device() == mx.gpu else "cpu"
        return {
            "version": str(VERSION),
            "program": f"glm-fused {packages.version('glm-fused')} on a {device}",
            "model": self.model,
            "kv_format": self.kv_format,
            "block_tokens": str(self.block_tokens),
        }

    def root(self) -> Block:
        """The root of a tree of such rows."""
        return root(repr(sorted(self.describe().items())))


class Found(NamedTuple):
    """A block's file, as its header tells; ``used`` is when, in nanoseconds."""

    id: str
    parent: str
    tokens: np.ndarray
    nbytes: int
    used: int


class Snapshots:
    """The files of a folder, which is made if it is missing.

    Raises ValueError where another process has the folder, and, naming what differs, where it has
    files of another model, format, program or version. Files with other names than blocks have are
    left alone.
    """

    def __init__(self, folder: Path, identity: Identity):
        self._folder, self._identity = folder, identity.describe()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"[prompts] {folder} cannot be a folder of prompts: {reason}."
            ) from None
        self._last = 0  # when a file was written or used, in nanoseconds
        self._stamping = threading.Lock()
        self._lock = _locked(folder)

    def index(self) -> list[Found]:
        """Every file, by its header; what an earlier process left half-written is deleted.

        A damaged file is deleted with a warning, as far as the header shows it.
        """
        found = []
        for entry in list(os.scandir(self._folder)):
            path = Path(entry.path)
            if _TEMPORARY.fullmatch(entry.name):
                _unlink(path)
            elif (name := _NAME.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                try:
                    found.append(self._header(path, name[1]))
                    self._last = max(self._last, found[-1].used)
                except _Damaged as error:
                    self._drop(path, error)
                except OSError as error:
                    logger.warning("[prompts] %s is not used: %s", path, error)
        return found

    def _header(self, path: Path, name: str) -> Found:
        """What a file says of itself; raises `_Damaged`, and ValueError for another identity."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
        except (SafetensorError, UnicodeDecodeError) as error:
            raise _Damaged(f"its header cannot be read: {error}") from None
        differing = [key for key, value in self._identity.items() if metadata.get(key) != value]
        if differing:
            _verified(path.read_bytes())  # else it is of nothing, whatever it says
            key = differing[0]
            raise ValueError(
                f"[prompts] {path} is of {key} {show(metadata.get(key))}, expected"
                f" {show(self._identity[key])}; choose another folder, or empty this one."
            )
        parent, tokens = metadata.get("parent", ""), _tokens(metadata)
        if block_id(parent, tokens) != name:
            raise _Damaged("its tokens are not those that its name stands for")
        status = path.stat()
        return Found(name, parent, tokens, status.st_size, status.st_mtime_ns)

    def write(self, block: Block, rows: Rows) -> int:
        """Write the file of a block with these rows; returns its bytes.

        Raises OSError where that fails, which leaves no file or the former one.
        """
        assert block.parent is not None
        metadata = self._identity | {
            "rows": rows.kv_format,
            "parent": block.parent.id,
            "tokens": json.dumps(block.tokens.tolist()),
            "checksum": _NO_CHECKSUM,
        }
        parts = {name: np.ascontiguousarray(part) for name, part in rows.parts.items()}
        header, data = _split(save(parts, metadata))
        before, after = header.split(_field(_NO_CHECKSUM))
        header = before + _field(_checksum(header, data)) + after
        with new_file(self.path(block.id)) as file:
            file.write(header)
            file.write(data)
        self.used(block)
        _sync(self._folder)
        return len(header) + len(data)

    def read(self, block: Block) -> Rows | None:
        """The rows of a block that has a file; None, with a warning, where it is damaged.

        Then the file is deleted.
        """
        path = self.path(block.id)
        try:
            data = path.read_bytes()
            metadata = _verified(data)
            if not np.array_equal(_tokens(metadata), block.tokens):
                raise _Damaged("it has other tokens")
            return Rows(metadata["rows"], load(data))
        except FileNotFoundError as error:  # it was the one to go
            logger.debug("[prompts] %s", error)
        except (OSError, _Damaged) as error:
            self._drop(path, error)
        return None

    def used(self, block: Block) -> None:
        """Note in its file that a block was used now, and with it those before it."""
        try:
            os.utime(self.path(block.id), ns=self._now())
        except OSError as error:
            logger.debug("[prompts] %s: %s", self.path(block.id), error)

    def _now(self) -> tuple[int, int]:
        """Times for a file, after those of all others, which a file system's own clock, with its
        few ticks a second, would give several files alike."""
        with self._stamping:
            self._last = max(self._last + 1, time.time_ns())
            return self._last, self._last

    def delete(self, block_id: str) -> None:
        """Delete the file of a block, if there is one."""
        _unlink(self.path(block_id))

    def path(self, block_id: str) -> Path:
        """Where the file of a block is."""
        return self._folder / f"{block_id}.safetensors"

    def close(self) -> None:
        """Let other processes have the folder."""
        os.close(self._lock)

    def _drop(self, path: Path, error: Exception) -> None:
        logger.warning("[prompts] %s is not used, and deleted: %s", path, error)
        _unlink(path)


class _Damaged(Exception):
    """A file is not what was written; the message goes on from its name."""


def _locked(folder: Path) -> int:
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ValueError(
            f"[prompts] another process keeps its prompts in {folder}; choose another folder."
        ) from None
    return lock


def _unlink(path: Path) -> None:
    """Delete a file, if it is there; a disk that does not let it is warned of."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("[prompts] %s cannot be deleted: %s", path, error)


def _split(file: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file with its length, and the data."""
    end = 8 + int.from_bytes(file[:8], "little")
    return file[:end], file[end:]


def _field(checksum: str) -> bytes:
    return f'"checksum":"{checksum}"'.encode()


def _checksum(header: bytes, data: bytes) -> str:
    return f"{_ext.checksum([header, data]):016x}"


def _verified(file: bytes) -> dict[str, Any]:
    """The metadata of a file that has its checksum; raises `_Damaged` for another."""
    header, data = _split(file)
    try:
        metadata = json.loads(header[8:])["__metadata__"]
        field = _field(metadata["checksum"])
        before, after = header.split(field)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Damaged("its header is damaged") from None
    expected = _field(_checksum(before + _field(_NO_CHECKSUM) + after, data))
    if field != expected:
        raise _Damaged("it does not have its checksum")
    assert isinstance(metadata, dict)
    return metadata


def _tokens(metadata: Mapping[str, str]) -> np.ndarray:
    try:
        return as_tokens(json.loads(metadata["tokens"]))
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise _Damaged("it does not list its tokens") from None


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
