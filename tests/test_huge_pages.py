"""Weights in the system's huge pages: values stay, and memory does not grow."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest

from glm_fused import _ext
from glm_fused.memory import resident_bytes

FOLDER = Path("/sys/kernel/mm/transparent_hugepage")
ALLOWED = _ext.huge_page_setting() in ("always", "madvise")


def huge_bytes() -> int:
    """The bytes of this process that lie in huge pages."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("AnonHugePages:")[1].split()[0]) * 1024


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
