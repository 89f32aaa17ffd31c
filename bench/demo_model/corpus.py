"""The text the demo model learns from: the Python standard library's own source.

``train.py`` and ``bits_per_byte.py`` share it, so that both agree on which files are held out.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TEST_DIRS = {"idle_test", "test", "tests"}
SKIPPED_DIRS = {
    "__pycache__",
    "config",
    "dist-packages",
    "ensurepip",
    "pgen2",
    "pydoc_data",
    "site-packages",
} | TEST_DIRS
SKIPPED_FILES = {"html/entities.py", "stringprep.py"}
HELD_OUT_PERCENT = 4


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path relative to the library root, and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether the file belongs to the held-out part (a hash of its path decides)."""
        return _path_hash(self.path) % 100 < HELD_OUT_PERCENT


def _path_hash(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")


def _is_data_table(path: str, text: str) -> bool:
    """Whether a file is mostly generated data rather than code."""
    if path in SKIPPED_FILES or path.startswith("_sysconfigdata"):
        return True
    return path.startswith("encodings/") and "decoding_table" in text


def load_corpus(root: Path | None = None) -> list[SourceFile]:
    """Read every usable source file under ``root`` (default: this Python's standard library)."""
    return _read(root, lambda folders: not any(map(_is_skipped, folders)))


def unseen_files(root: Path | None = None) -> list[SourceFile]:
    """The library's own tests, which no part of the model has been trained or measured on."""

    def wanted(folders: tuple[str, ...]) -> bool:
        others = set(folders) - TEST_DIRS
        return len(others) < len(folders) and not any(map(_is_skipped, others))

    return _read(root, wanted)


def _is_skipped(folder: str) -> bool:
    return folder in SKIPPED_DIRS or folder.startswith("config-")


def _read(root: Path | None, wanted: Callable[[tuple[str, ...]], bool]) -> list[SourceFile]:
    """The usable source files in folders that are ``wanted``."""
    root = Path(root or sysconfig.get_paths()["stdlib"])
    files: list[SourceFile] = []
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if not wanted(relative.parts[:-1]):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        path = relative.as_posix()
        if len(text) > 64 and not _is_data_table(path, text):
            files.append(SourceFile(path, text))
    return files


def training_files(root: Path | None = None) -> list[SourceFile]:
    """The files to train on."""
    return [file for file in load_corpus(root) if not file.held_out]


def held_out_files(root: Path | None = None) -> list[SourceFile]:
    """The files kept aside, in a fixed pseudo-random order."""
    files = [file for file in load_corpus(root) if file.held_out]
    return sorted(files, key=lambda file: _path_hash(file.path))


def held_out_texts(limit_bytes: int | None = None, root: Path | None = None) -> list[SourceFile]:
    """The held-out files up to ``limit_bytes`` of UTF-8 in all; the last is cut at a character."""
    chosen: list[SourceFile] = []
    left = limit_bytes
    for file in held_out_files(root):
        data = file.text.encode()
        if left is not None and len(data) > left:
            cut = data[:left].decode(errors="ignore")
            if cut:
                chosen.append(SourceFile(file.path, cut))
            break
        chosen.append(file)
        if left is not None:
            left -= len(data)
    return chosen
