"""Tokens beside drafts are drawn with the model's probabilities, at every place of a draft.

The model here is one of the package in which attention and MLP add nothing, so that a token depends
on the one before it alone: its probabilities are a table, which is known. What its MTP layer
predicts is near to that, and wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from test_draft_sampling import LIKELY, standardized

from glm_fused.generation.choice import Choice
from glm_fused.generation.decoding import Decoding, Drafting
from glm_fused.generation.drafts.options import DraftOptions
from glm_fused.generation.options import Options
from glm_fused.loader import load_model

VOCABULARY, DEPTH, TEMP = 8, 3, 0.8
PLACES = DEPTH + 1  # in a step: beside each draft, and after the last
PROMPT = [*range(VOCABULARY), *range(0, VOCABULARY, 2), *range(1, VOCABULARY, 2)]
LENGTH = 500  # tokens of a text
LONG, SHORT = 100_000, 4_000  # draws
SOURCES = ["mtp", "lookup"]
FOUND = 6.0  # standard deviations, of a fault; LIKELY are four


class Small(NamedTuple):
    """A model, and the probabilities [before, token] of its tokens, from its weights alone."""

    model: object
    table: np.ndarray


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    rng, size = np.random.default_rng(0), 128
    head = rng.normal(0, 0.15, (VOCABULARY, size)).astype(np.float32)
    embedding = rng.normal(0, 1, (VOCABULARY, size)).astype(np.float32)
    noise = rng.normal(0, 0.05, (size, 2 * size)).astype(np.float32)

    def edit(tensors):
        for name in tensors:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name] = mx.zeros_like(tensors[name])
            elif "norm.weight" in name:
                tensors[name] = mx.ones_like(tensors[name])
        tensors["lm_head.weight"] = mx.array(head)
        tensors["model.embed_tokens.weight"] = mx.array(embedding)
        tensors["model.layers.1.eh_proj.weight"] = mx.array(np.eye(size, 2 * size) + noise)

    config = tiny_config(
        vocab_size=VOCABULARY,
        hidden_size=size,
        num_hidden_layers=1,
        indexer_types=["full"],
        first_k_dense_replace=1,
        eos_token_id=[0],
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("small")
    write_checkpoint(path, config, layout="hf", dtype="float32", mtp=True, edit=edit)
    normed = embedding / np.sqrt((embedding.astype(float) ** 2).mean(1, keepdims=True) + 1e-5)
    weights = np.exp(normed @ head.T.astype(float) / TEMP)
    return Small(load_model(path, mtp=True)[0], weights / weights.sum(1, keepdims=True))


def drawn(model, source, draws):
    """How often each token came at each place of a step after each other: [place, before, token].

    Each text has a seed of its own. Plain steps, which measure, are left out.
    """
    counts = np.zeros((PLACES, VOCABULARY, VOCABULARY), int)
    for seed in range(draws // LENGTH):
        how = Options(max_tokens=LENGTH, temp=TEMP, seed=seed)
        drafting = Drafting.of(DraftOptions(DEPTH, source), model)
        decoding = Decoding(model, PROMPT, how, model.make_cache(), 16, drafting)
        before = PROMPT[-1]
        for token, logits, place in decoding.steps():
            if len(logits) == PLACES:
                counts[place, before, token] += 1
            before = token
    return counts


def deviations(counts, table):
    """Of each place, how far its counts are from the table, in standard deviations."""
    found = []
    for place in counts:
        expected = place.sum(1, keepdims=True) * table
        rare = expected < 10
        cells = np.append(place[~rare], np.where(rare, place, 0).sum(1))
        wanted = np.append(expected[~rare], np.where(rare, expected, 0).sum(1))
        found.append(standardized(cells, wanted, (~rare).sum() - VOCABULARY + rare.any(1).sum()))
    return np.array(found)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("draws", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_every_place_has_the_probabilities_of_the_model(small, source, draws):
    counts = drawn(small.model, source, draws)
    found = deviations(counts, small.table)
    print(source, counts.sum((1, 2)), found)
    assert counts[0].sum() > counts[-1].sum() > draws // 50
    assert (found < LIKELY).all()


@pytest.mark.parametrize(
    ("source", "wrong", "draws"),
    [
        ("mtp", 0, SHORT),
        ("lookup", 0, SHORT),
        *(pytest.param(s, n, 5 * SHORT, marks=pytest.mark.slow) for s in SOURCES for n in (1, 2)),
    ],
)
def test_another_draw_in_place_of_a_rejected_draft_is_found(
    small, monkeypatch, source, wrong, draws
):
    """It favours what drafts often say, since those that stay come besides."""
    judge, keys = Choice.judge, iter(mx.random.split(mx.random.key(1), draws))

    def biased(self, logits, draft):
        chosen, at = judge(self, logits, draft), mx.arange(len(logits))
        another = mx.random.categorical(logits / TEMP, key=next(keys))
        stays = mx.concatenate([draft, chosen[-1:]]) == chosen
        return mx.where((at == wrong) & ~stays, another, chosen)

    monkeypatch.setattr(Choice, "judge", biased)
    found = deviations(drawn(small.model, source, draws), small.table)
    print(source, wrong, found)
    assert found[wrong] > FOUND
    assert (np.delete(found, wrong) < LIKELY).all()
