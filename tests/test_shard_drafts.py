"""Drafts of several ranks: the tokens and logits of one process, and the same steps everywhere."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import ring
from shard_drafts_program import CASES, cases_of

from glm_fused import Engine, EngineOptions

PROGRAM = ring.TESTS / "shard_drafts_program.py"


@pytest.fixture(scope="module")
def alone():
    """What one process gives."""
    with Engine("demo", EngineOptions(draft="auto", prefill_step_size=16)) as engine:
        return cases_of(engine)


@pytest.mark.parametrize(
    "size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))]
)
def test_tokens_and_logits_are_those_of_one_process(alone, tmp_path, size):
    outs = ring.run(size, PROGRAM, tmp_path, "same", folder=tmp_path)
    counts = [json.loads(out) for out in outs]
    assert all(found == counts[0] for found in counts)
    assert all(counts[0][name] > 0 for name in (*CASES, "batch"))
    for rank in range(size):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, (tokens, logits, _) in alone.items():
            assert np.array_equal(found[f"{name} 0"], tokens), (rank, name)
            assert np.array_equal(found[f"{name} 1"], logits), (rank, name)


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ("depth", "rank 0 drafts 3 tokens by mtp, rank 1 drafts 2 tokens by mtp"),
        pytest.param(
            "none",
            "rank 0 drafts 3 tokens by mtp, rank 1 takes a plain step",
            marks=pytest.mark.slow,
        ),
        ("times", r"rank 0 [\w ]+, rank 1 [\w ]+"),
    ],
)
def test_unlike_steps_are_an_error(tmp_path, mode, what):
    """Of ranks that draft unlike numbers of tokens, or count times of their own."""
    ends = ring.finish(ring.start([[PROGRAM, tmp_path, mode]] * 2, tmp_path))
    expected = rf"\[shard\] ranks must take the same steps: {what}\.\n"
    for code, _, errors in ends:
        assert code in (1, 2)
        assert re.search(expected, errors)


def test_a_small_model_drafts_for_one_process_alone():
    """Other machines may have other bits of a model that is not this package's."""
    expected = r"draft_from is 'small', expected 'mtp', 'lookup' or 'mtp\+lookup' for ranks"
    with pytest.raises(ValueError, match=expected):
        ranks = SimpleNamespace(rank=0, size=2)
        EngineOptions(draft=2, draft_from="small", ranks=ranks, prefill_step_size=16)
