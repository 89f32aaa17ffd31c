"""Drafts of several ranks: the tokens and logits of one process, and the same steps everywhere."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import ring
from conftest import tiny_config_51, write_checkpoint
from shard_drafts_program import CASES, cases_of

from glm_fused import Engine, EngineOptions
from glm_fused.checkpoint.paths import checkpoint_path
from glm_fused.generation import decoding
from glm_fused.generation.lockstep import Lockstep

PROGRAM = ring.TESTS / "shard_drafts_program.py"
ANY, PLAIN = r"[\w ]+", r"takes a plain step at \d+"
THREE, TWO = (rf"drafts {count} tokens by mtp at \d+" for count in (3, 2))


def cases_alone(model):
    """What one process gives, which counts its times as late as ranks do."""
    options = EngineOptions(draft="auto", prefill_step_size=16)
    with pytest.MonkeyPatch.context() as patch, Engine(model, options) as engine:
        patch.setattr(decoding, "steps_of", lambda model: Lockstep(lambda row: row[None], [0]))
        return cases_of(engine)


def check(alone, size, shard, folder, model="demo", drafted=(*CASES, "batch")):
    """All ranks have the tokens and logits of one process, count the same, and draft the same.

    What "auto" chooses depends on times.
    """
    outs = ring.run(size, PROGRAM, folder, shard, "same", model, folder=folder)
    counts = [json.loads(out) for out in outs]
    assert all({**counts[0], **found} == counts[0] for found in counts)
    assert all(counts[0][name][0] > 0 for name in drafted)
    assert all(counts[0][name] == alone[name][2] for name in ("layer", "look-up"))
    for rank in range(size):
        found = np.load(folder / f"{rank}.npz")
        names = [name for name in alone if name in counts[rank]]
        assert len(names) == len(alone) - (shard == "pipeline" and rank > 0)
        for name in names:
            tokens, logits, _ = alone[name]
            assert np.array_equal(found[f"{name} 0"], tokens), (rank, name)
            assert np.array_equal(found[f"{name} 1"], logits), (rank, name)


@pytest.fixture(scope="module")
def alone():
    return cases_alone("demo")


@pytest.mark.parametrize(
    ("shard", "size"),
    [
        ("tensor", 2),
        ("pipeline", 2),
        pytest.param("tensor", 3, marks=pytest.mark.slow),
        pytest.param("tensor", 4, marks=pytest.mark.slow),
        pytest.param("pipeline", 3, marks=pytest.mark.slow),
    ],
)
def test_tokens_and_logits_are_those_of_one_process(alone, tmp_path, shard, size):
    check(alone, size, shard, tmp_path)


@pytest.mark.slow
def test_hidden_states_out_of_order_are_noticed(alone, tmp_path):
    """Tokens and logits do not show it: drafts change none."""
    ring.run(2, PROGRAM, tmp_path, "pipeline", "early", "demo", folder=tmp_path)
    found, (tokens, _, _) = np.load(tmp_path / "0.npz"), alone["layer"]
    assert np.array_equal(found["layer 0"], tokens)
    assert not np.array_equal(found["layer's keys 1"], alone["layer's keys"][1])


@pytest.mark.slow
def test_random_weights_whose_layers_all_choose(tmp_path):
    """There are as many groups of layers as layers, and drafts are wrong."""
    model = write_checkpoint(tmp_path / "model", tiny_config_51(vocab_size=2048), mtp=True)
    for file in checkpoint_path("demo").glob("*token*"):
        shutil.copy(file, model)
    check(cases_alone(model), 4, "pipeline", tmp_path, model, ["layer"])


@pytest.mark.parametrize(
    ("shard", "mode", "what"),
    [
        ("tensor", "depth", (THREE, TWO)),
        pytest.param("tensor", "none", (THREE, PLAIN), marks=pytest.mark.slow),
        pytest.param("tensor", "times", (ANY, ANY), marks=pytest.mark.slow),
        pytest.param("pipeline", "depth", (THREE, TWO), marks=pytest.mark.slow),
        pytest.param("pipeline", "times", (ANY, ANY), marks=pytest.mark.slow),
        ("pipeline", "keeps", (THREE, THREE)),
        pytest.param("pipeline", "others", (THREE, THREE), marks=pytest.mark.slow),
    ],
)
def test_unlike_steps_are_an_error(tmp_path, shard, mode, what):
    """Of ranks that draft or keep unlike numbers of tokens, or count times of their own."""
    ends = ring.finish(ring.start([[PROGRAM, tmp_path, shard, mode, "demo"]] * 2, tmp_path))
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
