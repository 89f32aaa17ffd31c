"""Libraries that are loaded before all others, to fail where they are told to."""

import ctypes
import errno
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CPP = Path(__file__).parents[2] / "cpp"
NONE, ERROR, END, SHORT, DELAY, WRONG_BYTE = range(6)


def compiler():
    """A C++ compiler, or None."""
    return shutil.which("c++") or shutil.which("g++")


def build(name):
    """Build tests/cpp/<name>.cpp as a shared library, once for each content."""
    source = CPP / f"{name}.cpp"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"glm-fused-{os.getuid()}-{name}-{digest}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC"]
        subprocess.run([compiler(), *flags, source, "-o", unfinished], check=True)
        unfinished.rename(library)
    return str(library)


class Reads:
    """The faults of tests/cpp/faulty_preadv.cpp, in a process that was started with it.

    They hit ``preadv``, which reads experts, or with ``loads`` ``pread``, by which MLX loads files.
    """

    def __init__(self, loads=False):
        library = ctypes.CDLL(None)
        integer = ctypes.c_int64
        self._function = int(loads)
        self._arm = library.faults_arm
        self._arm.argtypes = [ctypes.c_int] * 3 + [integer] * 2 + [ctypes.c_int, ctypes.c_uint64]
        library.faults_calls.restype = library.faults_hits.restype = integer
        self._calls, self._hits = library.faults_calls, library.faults_hits

    def arm(self, kind, first=0, count=0, permille=0, seed=0, error=errno.EIO):
        """Hit calls ``first`` to ``first + count`` from now on, and ``permille`` of the others."""
        self._arm(self._function, kind, error, first, count, permille, seed)

    def disarm(self):
        """Count calls from 0, and hit none."""
        self.arm(NONE)

    @property
    def calls(self):
        """How many reads there were since the last `arm`."""
        return self._calls(self._function)

    @property
    def hits(self):
        """How many of these reads a fault hit."""
        return self._hits(self._function)
