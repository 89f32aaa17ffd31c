"""Amounts of memory: how texts write them, and how much this process takes."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from pathlib import Path

from .validation import show

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """The bytes that a text such as "24GB", "512MiB" or "1000B" stands for.

    Raises ValueError for other texts and from 2^63 on. A number without a unit is refused, too:
    whoever writes 24 does not mean bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"expected a size with its unit, such as 24GB or 512MiB: {show(text)}")
    number, unit, binary = match.groups()
    unit = "" if unit is None else unit.lower()
    power = "kmgt".find(unit) + 1 if unit else 0
    nbytes = float(number) * (1024**power if binary else 1000**power)
    if nbytes >= 2**63:
        raise ValueError(f"expected a size below 2^63 bytes: {show(text)}")
    return int(nbytes)


def size(n: int) -> str:
    """``n`` bytes as a text, in the decimal units that people buy memory in."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= unit:
            return f"{n / unit:.2f} {name}"
    return f"{n} B"


def machine_bytes() -> int:
    """The bytes of memory that this machine has, or that its container may use."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    with contextlib.suppress(OSError, ValueError):  # the file may be absent, or say "max"
        total = min(total, int(limit.read_text()))
    return total


def resident_bytes() -> int:
    """The bytes that this process keeps in memory now (on macOS: its peak so far)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def peak_resident_bytes() -> int:
    """The most bytes that this process has kept in memory."""
    try:  # not ru_maxrss, which a child inherits from the process that started it
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
