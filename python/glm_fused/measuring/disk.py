"""How fast a disk is read, past the page cache, as streamed experts are."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROBE_BYTES = 256 << 20
_BLOCK = 4 << 20  # bytes of a read, about a part of an expert
_AT_ONCE = 8  # reads in flight


def read_rate(file: Path, most: int = PROBE_BYTES) -> float:
    """The bytes a second at which a file is read, up to ``most`` bytes from its middle on.

    Where the system knows no reads past the page cache, its cache is asked to forget the file.
    Raises OSError for a file that cannot be read and ValueError for an empty one.
    """
    nbytes = file.stat().st_size
    if not nbytes:
        raise ValueError(f"[disk] {file} is empty, expected bytes to read.")
    first = max(0, (nbytes - most) // 2) // _BLOCK * _BLOCK
    places = range(first, min(nbytes, first + most), _BLOCK)
    descriptor = _open(file)
    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            began = time.perf_counter()
            read = sum(pool.map(lambda at: _read(descriptor, at), places))
            return read / (time.perf_counter() - began)
    finally:
        os.close(descriptor)


def folder_rate(folder: Path) -> float:
    """The same of a file that is written to ``folder``, or to what will hold it, for the time."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    with tempfile.NamedTemporaryFile(dir=there) as file:
        for _ in range(PROBE_BYTES // _BLOCK):
            file.write(os.urandom(_BLOCK))
        file.flush()
        os.fsync(file.fileno())
        return read_rate(Path(file.name))


def _open(file: Path) -> int:
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:  # a file system in memory has no reads past its cache
        descriptor = os.open(file, os.O_RDONLY)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
    else:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor


def _read(descriptor: int, at: int) -> int:
    """The bytes that one read at ``at`` gives."""
    with mmap.mmap(-1, _BLOCK) as block:  # lies at a page's start, as direct reads want it
        return os.preadv(descriptor, [block], at)
