"""Weights and caches in the system's huge pages: values stay, and memory does not grow."""

import mmap
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from glm_fused import _ext
from glm_fused.memory import resident_bytes
from glm_fused.models.cache import append

FOLDER = Path("/sys/kernel/mm/transparent_hugepage")
ALLOWED = _ext.huge_page_setting() in ("always", "madvise")


def huge_bytes() -> int:
    """The bytes of this process that lie in huge pages."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("AnonHugePages:")[1].split()[0]) * 1024


def bytes_that_ask(a: mx.array | np.ndarray) -> int:
    """The array's bytes in mappings for which the system was asked for huge pages.

    Whether it has any left at that time is another matter.
    """
    first = np.asarray(memoryview(a)).ctypes.data
    found, overlap = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if at := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            overlap = min(int(at[2], 16), first + a.nbytes) - max(int(at[1], 16), first)
        elif overlap > 0 and line.startswith("VmFlags:") and "hg" in line.split():
            found += overlap
    return found


def test_the_setting_is_the_system_s():
    if not FOLDER.exists():
        assert _ext.huge_page_setting() == ""
    else:
        assert f"[{_ext.huge_page_setting()}]" in (FOLDER / "enabled").read_text()


def test_values_stay_and_memory_does_not_grow():
    a = mx.arange(16 << 20, dtype=mx.uint32)
    mx.eval(a)
    before = resident_bytes()
    moved = _ext.move_to_huge_pages(a)
    assert 0 <= moved <= a.nbytes
    if moved:
        assert huge_bytes() >= moved
        assert resident_bytes() <= before + (8 << 20)
    assert (a == mx.arange(16 << 20, dtype=mx.uint32)).all().item()


@pytest.mark.skipif(sys.platform != "linux" or not ALLOWED, reason="needs huge pages")
def test_only_whole_pages_are_moved():
    page = int((FOLDER / "hpage_pmd_size").read_text())
    a = mx.zeros((page - 4,), mx.uint8)
    assert _ext.move_to_huge_pages(a) == 0
    # However it lies, an array holds one page less than it has the bytes for.
    b = mx.zeros((8 * page,), mx.uint8)
    assert _ext.move_to_huge_pages(b) % page == 0
    part = mx.zeros((8 * page,), mx.uint8)[page + 1 : 2 * page]
    assert _ext.move_to_huge_pages(part) == 0


@pytest.mark.skipif(sys.platform != "linux" or not ALLOWED, reason="needs huge pages")
def test_a_cache_asks_for_huge_pages_from_the_first_and_when_it_has_grown():
    cache = KVCache()
    rows = mx.random.normal((1, 1, 40_000, 256)).astype(mx.float16)
    ropes = mx.zeros((1, 1, 40_000, 0), mx.float16)
    for first, last in ((0, 20_000), (20_000, 40_000)):
        append(cache, rows[:, :, first:last], ropes[:, :, first:last], "fp16")
        # However it lies, it ends in two pages that others share.
        assert bytes_that_ask(cache.keys) >= cache.keys.nbytes - (4 << 20)
    assert mx.array_equal(cache.keys[..., :40_000, :], rows)
    nobody_asked = np.frombuffer(mmap.mmap(-1, 20 << 20, mmap.MAP_PRIVATE), np.uint8)
    assert bytes_that_ask(nobody_asked) == 0


def test_a_cache_begins_with_zeros_of_any_size():
    for capacity, width in ((0, 3), (5, 0), (7, 3), (9_000, 300)):
        made = _ext.cache_buffer(2, capacity, width, mx.float16)
        assert made.shape == (2, 1, capacity, width) and made.dtype == mx.float16
        assert not made.any().item()
    with pytest.raises(ValueError, match="cannot be given memory"):
        _ext.cache_buffer(2**31 - 1, 2**31 - 1, 2**31 - 1, mx.float32)
    with pytest.raises(ValueError, match="cannot be given memory"):
        _ext.cache_buffer(1, -1, 4, mx.float32)
