"""What tells one checkpoint's weights from another's, without reading all of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .folder import Checkpoint
from .safetensors_header import TensorInfo

SAMPLE = 4096  # bytes of each tensor
_READERS = 16


def checkpoint_id(checkpoint: Checkpoint) -> str:
    """A digest of config, headers and a block of every tensor.

    Fine-tuned, pruned and quantized models have others, copies of a checkpoint the same. A change
    that leaves every one of those blocks as it was is not noticed. So it is of experts that a
    sidecar alone has.

    Raises OSError, naming the file, where reading fails.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    tensors = sorted(checkpoint.tensors.items())
    for name, info in tensors:
        digest.update(repr((name, info.dtype, info.shape)).encode())
    for block in _samples(checkpoint.folder, [info for _, info in tensors]):
        digest.update(block)
    return digest.hexdigest()[:32]


def _samples(folder: Path, tensors: list[TensorInfo]) -> Iterator[bytes]:
    """A block from the middle of each tensor, in their order."""
    paths = {info.file: folder / info.file for info in tensors}
    opened: dict[str, int] = {}

    def read(info: TensorInfo) -> bytes:
        nbytes = min(SAMPLE, info.nbytes)
        try:
            return os.pread(opened[info.file], nbytes, info.start + (info.nbytes - nbytes) // 2)
        except OSError as error:
            path = str(paths[info.file])
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from error

    try:
        for file, path in paths.items():
            opened[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with ThreadPoolExecutor(_READERS) as pool:
            yield from pool.map(read, tensors)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
