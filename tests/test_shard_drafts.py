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
ANY, PLAIN = r"[\w ]+", r"takes a plain step at \d+"
THREE, TWO = (rf"drafts {count} tokens by mtp at \d+" for count in (3, 2))


@pytest.fixture(scope="module")
def alone():
    """What one process gives."""
    with Engine("demo", EngineOptions(draft="auto", prefill_step_size=16)) as engine:
        return cases_of(engine)


@pytest.mark.parametrize("shard", ["tensor", "pipeline"])
@pytest.mark.parametrize(
    "size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))]
)
def test_tokens_and_logits_are_those_of_one_process(alone, tmp_path, shard, size):
    outs = ring.run(size, PROGRAM, tmp_path, shard, "same", folder=tmp_path)
    counts = [json.loads(out) for out in outs]
    assert all(found == counts[0] for found in counts)
    assert all(counts[0][name] > 0 for name in (*CASES, "batch"))
    for rank in range(size):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, (tokens, logits, _) in alone.items():
            assert np.array_equal(found[f"{name} 0"], tokens), (rank, name)
            assert np.array_equal(found[f"{name} 1"], logits), (rank, name)


@pytest.mark.parametrize(
    ("shard", "mode", "what"),
    [
        ("tensor", "depth", (THREE, TWO)),
        pytest.param("tensor", "none", (THREE, PLAIN), marks=pytest.mark.slow),
        ("tensor", "times", (ANY, ANY)),
        pytest.param("pipeline", "depth", (THREE, TWO), marks=pytest.mark.slow),
        pytest.param("pipeline", "times", (ANY, ANY), marks=pytest.mark.slow),
        ("pipeline", "keeps", (THREE, THREE)),
        pytest.param("pipeline", "others", (THREE, THREE), marks=pytest.mark.slow),
    ],
)
def test_unlike_steps_are_an_error(tmp_path, shard, mode, what):
    """Of ranks that draft or keep unlike numbers of tokens, or count times of their own."""
    ends = ring.finish(ring.start([[PROGRAM, tmp_path, shard, mode]] * 2, tmp_path))
    first, second = what
    steps = f"rank 0 {first}, rank 1 {second}"
    expected = rf"\[shard\] ranks must take the same steps: {steps}\.\n"
    for code, _, errors in ends:
        assert code in (1, 2)
        assert re.search(expected, errors)


def test_a_small_model_drafts_for_one_process_alone():
    """Other machines may have other bits of a model that is not this package's."""
    expected = r"draft_from is 'small', expected 'mtp', 'lookup' or 'mtp\+lookup' for ranks"
    with pytest.raises(ValueError, match=expected):
        ranks = SimpleNamespace(rank=0, size=2)
        EngineOptions(draft=2, draft_from="small", ranks=ranks, prefill_step_size=16)
