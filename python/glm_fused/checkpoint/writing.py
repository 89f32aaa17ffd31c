"""Writes files and folders that have their names once they are whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..memory import size


def temporary_name(path: Path) -> Path:
    """A name next to ``path`` that no other process uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` once the block ends without an error."""
    temporary = temporary_name(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` once the block ends without an error.

    Raises FileExistsError where ``path`` is a file or a folder that holds something.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"[output] {path} is a file, expected a folder to write.")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"[output] {path} is not empty, expected an empty or new folder.")
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_space(path: Path, needed: int) -> None:
    """Raise ValueError unless the disk of a folder has so many bytes free."""
    free = shutil.disk_usage(path).free
    if needed > free:
        raise ValueError(f"[output] {path}: {size(needed)} needed, {size(free)} free.")
