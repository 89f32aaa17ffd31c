"""Ranks that have some layers each give the bits of one process, and have work at the same time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import ring
from conftest import tiny_config, tiny_config_51, write_checkpoint
from pipeline_program import BEGINNINGS, HOW, PROMPTS, steps_of
from test_shards import KINDS

from glm_fused import load_model
from glm_fused.models.config import args_from_config
from glm_fused.models.pipeline import bounds_of

PROGRAM = ring.TESTS / "pipeline_program.py"


@pytest.fixture(scope="module")
def demo():
    return alone("demo")


def alone(path):
    """The bits that a model gives in one process."""
    model, _ = load_model(path, mtp=True)
    return steps_of(model)


def of_ranks(size, folder, fault="none", models=("demo",)):
    """The bits of each model and rank."""
    ring.run(size, PROGRAM, "logits", folder, fault, *models, folder=folder)
    names = [f"{ring.Path(model).name}.{fault}.{rank}" for model in models for rank in range(size)]
    return [dict(np.load(folder / f"{name}.npz")) for name in names]


def differing(found, expected, rank):
    """The steps whose bits differ; rank 0 alone has drafts."""
    assert found.keys() == {name for name in expected if rank == 0 or "draft" not in name}
    return [step for step in found if not np.array_equal(found[step], expected[step])]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_the_bits_of_one_process(demo, tmp_path, size):
    for rank, found in enumerate(of_ranks(size, tmp_path)):
        assert differing(found, demo, rank) == []


@pytest.mark.parametrize("fault", ["skipped", "late"])
def test_a_layer_that_does_something_else_is_noticed(demo, tmp_path, fault):
    """The texts of the batch are so short that every key is chosen."""
    for rank, found in enumerate(of_ranks(2, tmp_path, fault)):
        long = {step for step in found if "batch" not in step}
        assert long <= set(differing(found, demo, rank))


@pytest.mark.slow
def test_kinds_of_models(tmp_path):
    kinds = KINDS | {"5.1": (tiny_config_51(), {"layout": "hf"})}
    for name, (config, how) in kinds.items():
        write_checkpoint(tmp_path / name, config, mtp=True, **how)
    paths = [tmp_path / name for name in kinds]
    found = of_ranks(2, tmp_path, models=paths)
    for i, path in enumerate(paths):
        expected = alone(path)
        for rank in range(2):
            assert differing(found[2 * i + rank], expected, rank) == [], path


def test_all_ranks_have_work_at_once(engine, tmp_path):
    """Chunks of a prompt follow one another, and batches take turns."""
    calls = 2 * 5 + 2 * HOW["max_tokens"]  # of two batches, which take 149 tokens, 30 at a time
    first, second = map(json.loads, turns(tmp_path, calls, 60, "none"))
    expected = [answer.tokens for answer in engine.generate_batch(PROMPTS, **HOW).answers]
    assert first["tokens"] == second["tokens"] == expected
    assert (second["calls"], second["kept"]) == (calls, calls - 1)


@pytest.mark.parametrize(
    ("fault", "kept"), [("none", 9), pytest.param("primes at once", 0, marks=pytest.mark.slow)]
)
def test_prompts_that_drafts_follow_do_not_wait(engine, tmp_path, fault, kept):
    """Of which the hidden states come back: ten chunks, of all texts together."""
    first, second = map(json.loads, turns(tmp_path, 10, 60 if kept else 1, fault, 2))
    expected = [answer.tokens for answer in engine.generate_batch(PROMPTS, **HOW).answers]
    assert first["tokens"] == second["tokens"] == expected
    assert second["kept"] == kept


def test_a_batch_that_waits_for_itself_is_noticed(tmp_path):
    calls = 10 + HOW["max_tokens"]
    _, second = map(json.loads, turns(tmp_path, calls, 2, "one batch"))
    assert second["calls"] == calls
    assert second["kept"] <= 10


@pytest.mark.slow
def test_a_prompt_that_waits_for_itself_is_noticed(tmp_path):
    _, second = map(json.loads, turns(tmp_path, 10 + 2 * HOW["max_tokens"], 1, "waits for prompts"))
    assert second["kept"] == 0


def turns(folder, calls, seconds, *how, program="turns"):
    return ring.run(2, PROGRAM, program, folder, calls, seconds, *how, folder=folder)


def test_a_server_has_steps_of_two_batches_on_their_way(engine, tmp_path):
    """Each step but the first and the last two is with rank 1 until another one has begun."""
    calls = 2 * HOW["max_tokens"]
    first, second = map(json.loads, turns(tmp_path, calls - 1, 60, "none", program="served"))
    expected = [answer.tokens for answer in engine.generate_batch(BEGINNINGS, **HOW).answers]
    assert first["tokens"] == expected
    assert (second["calls"], second["kept"]) == (calls, calls - 3)


def test_a_server_whose_texts_are_in_one_batch_is_noticed(tmp_path):
    calls = 2 * HOW["max_tokens"]
    first, second = map(json.loads, turns(tmp_path, calls - 1, 1, "one batch", program="served"))
    assert second["kept"] == 0 and list(map(len, first["tokens"])) == [HOW["max_tokens"]] * 2


def test_other_threads_run_while_a_rank_lets_go_of_memory(tmp_path):
    """Those that tell the other ranks that this one is alive; MLX itself would hold them up."""
    first, _ = ring.run(2, PROGRAM, "threads", folder=tmp_path)
    by_tidy, by_mlx = json.loads(first)
    assert by_mlx <= 2
    assert by_tidy > 5 * max(1, by_mlx)


def test_layers_are_shared_out_by_bytes():
    """Groups begin at layers 0, 1 and 3; the embedding and MTP are on the first rank."""
    args = args_from_config(tiny_config()).with_mtp()

    def sizes(*layers, embedding=0):
        found = {f"model.layers.{i}.some": size for i, size in enumerate(layers)}
        return found | {"model.embed_tokens": embedding}

    assert bounds_of(args, sizes(1, 1, 1, 1, 1, 0), 2) == (0, 3, 5)
    assert bounds_of(args, sizes(9, 1, 1, 1, 1, 0), 2) == (0, 1, 5)
    assert bounds_of(args, sizes(1, 1, 1, 1, 1, 0, embedding=3), 2) == (0, 1, 5)
    assert bounds_of(args, sizes(1, 1, 1, 1, 1, 3), 2) == (0, 1, 5)
    assert bounds_of(args, sizes(1, 1, 1, 1, 9, 0), 3) == (0, 1, 3, 5)
    with pytest.raises(ValueError, match=r"5 layers are 3 groups, .* not enough for 4 ranks"):
        bounds_of(args, sizes(1, 1, 1, 1, 1, 1), 4)
    every = args_from_config(tiny_config_51(num_hidden_layers=8))
    assert bounds_of(every, sizes(*[2] * 8, embedding=1), 4) == (0, 2, 4, 6, 8)
