"""The faults of tests/cpp/faulty_memory.cpp, in a process that was started with it."""

import ctypes
from pathlib import Path

from glm_fused import _ext

MEMORY, THREADS = range(2)


class Faults:
    """Has memory that the extension asks for, or threads that anyone asks for, be refused."""

    def __init__(self):
        library = ctypes.CDLL(None)
        self._arm = library.memory_arm
        self._arm.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int]
        library.memory_calls.restype = library.memory_hits.restype = ctypes.c_int64
        self.calls, self.hits = library.memory_calls, library.memory_hits
        library.memory_watch.argtypes = [ctypes.c_size_t] * 2
        library.memory_watch(*code_of(_ext.__file__))

    def arm(self, what, first, onwards=False):
        """Let call ``first`` from now on fail, and with ``onwards`` all that follow."""
        self._arm(what, first, onwards)

    def disarm(self, what):
        """Let no call fail."""
        self.arm(what, -1)


def code_of(file):
    """The first address of a loaded library's code, and the one behind it."""
    path = str(Path(file).resolve())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [line[0].split("-") for line in lines if line[-1] == path and "x" in line[1]]
    return int(ranges[0][0], 16), int(ranges[-1][1], 16)
