"""Several ranks give the bits of one process: long texts, the slice of true shapes, Metal."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import ring
from conftest import tiny_config, write_checkpoint
from shard_long_program import DECODED, SIMULATED, what_of
from shard_program import bits
from test_shards import differing

from glm_fused import load_model
from glm_fused.formats.kv_rows import KV_FORMATS

PROGRAM = ring.TESTS / "shard_long_program.py"
pytestmark = pytest.mark.slow


def of_ranks(size, folder, split, *arguments, recorded=0):
    """The bits of each rank, which is to have recorded so many steps at least."""
    ring.run(size, PROGRAM, folder, split, *arguments, folder=folder, timeout=3000)
    found = [dict(np.load(folder / f"{rank}.npz")) for rank in range(size)]
    steps = [int(each.pop("recorded")) for each in found]
    assert len(set(steps)) == 1 and steps[0] >= recorded
    return found


def alone(path, what, kv_formats=()):
    model, _ = load_model(path)
    return bits(what_of(model, what, kv_formats))


@pytest.fixture(scope="module")
def texts():
    """The bits of the bundled model's texts in one process."""
    return alone("demo", "long", KV_FORMATS)


SPLITS = [(2, "rows"), (3, "rows"), (4, "rows"), (2, "recorded"), (3, "recorded")]


@pytest.mark.parametrize(("size", "split"), SPLITS)
def test_long_texts(texts, tmp_path, size, split):
    """Prompts of 20 x index_topk, 300 tokens, batches, and every format of caches."""
    assert len(texts) > DECODED
    steps = DECODED if split == "recorded" else 0
    for found in of_ranks(size, tmp_path, split, "long", "demo", *KV_FORMATS, recorded=steps):
        assert differing(found, texts) == []


def test_a_matrix_split_by_columns_is_noticed(texts, tmp_path):
    for found in of_ranks(2, tmp_path, "columns", "long", "demo", *KV_FORMATS):
        assert len(differing(found, texts)) > len(texts) // 2


def test_steps_on_metal(tmp_path):
    config = tiny_config(index_topk=16)
    write_checkpoint(tmp_path / "m", config, quantization={"group_size": 32, "bits": 4})
    expected = alone(tmp_path / "m", "metal")
    assert len(expected) > SIMULATED
    for found in of_ranks(2, tmp_path, "rows", "metal", tmp_path / "m"):
        assert differing(found, expected) == []
    for found in of_ranks(2, tmp_path, "columns", "metal", tmp_path / "m"):
        assert len(differing(found, expected)) > SIMULATED // 2


@pytest.mark.parametrize(("size", "split"), SPLITS)
def test_true_shapes(tmp_path, monkeypatch, size, split):
    """Three layers of GLM-5.2's shapes, with prompts beyond what a query selects."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "bench")])
    import glm52_slice
    from bench_shards import SLICE

    path = tmp_path / "slice"
    path.mkdir()
    glm52_slice.write(SLICE, "affine4", path)
    expected = alone(path, "short")
    steps = 5 if split == "recorded" else 0
    for found in of_ranks(size, tmp_path, split, "short", path, recorded=steps):
        assert differing(found, expected) == []
