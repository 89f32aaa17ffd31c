"""Ranks that share out the indexer's scores select what one process selects."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config
from long_context import KEY_FORMATS, random, random_rows
from metal_backend import metal

from glm_fused.models import sharded_indexer
from glm_fused.models.cache import Span
from glm_fused.models.config import args_from_config
from glm_fused.models.indexer import Indexer
from glm_fused.models.ranks import Ranks
from glm_fused.models.sharded_indexer import Price, ShardedIndexer, keys_pay, pays

ALWAYS = Price(-(1 << 62), 0)
TOPK = 24


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Scores are shared out whatever that costs."""
    monkeypatch.setattr(sharded_indexer, "CPU", ALWAYS)
    monkeypatch.setattr(sharded_indexer, "GPU", ALWAYS)


class Meeting(Ranks):
    """Ranks in one process: they come one after the other, and again when all parts are there."""

    def __init__(self, size):
        super().__init__(SimpleNamespace(rank=lambda: 0, size=lambda: size))
        self.parts = {}

    def _gather(self, part, is_awaited=True):
        self.parts[self.rank] = part
        parts = [self.parts.get(rank, part) for rank in range(self.size)]
        return mx.concatenate(parts)


def indexer(heads, dim, **config):
    args = args_from_config(
        tiny_config(index_n_heads=heads, index_head_dim=dim, index_topk=TOPK) | config
    )
    return Indexer(args)


def of_ranks(whole, size, *given):
    """What each rank selects."""
    ranks, found = Meeting(size), []
    shared = ShardedIndexer.of(whole, ranks)
    for turn in range(2):
        for ranks.rank in range(size):
            selected = shared.select(*given)
            mx.eval(selected, *ranks.parts.values())
            found += [np.array(selected)] * turn
    assert set(ranks.parts) == set(range(size))  # so scores were shared out
    return found


def check(whole, size, *given):
    expected = np.array(whole.select(*given))
    for selected in of_ranks(whole, size, *given):
        assert selected.dtype == np.int32
        assert np.array_equal(selected, expected)


def from_scores(scores, weight=1.0):
    """What `select` takes for one token and keys with such scores, times a weight."""
    keys = np.zeros((1, len(scores), 64), np.float32)
    keys[0, :, 0] = scores
    q = (mx.arange(64) == 0).astype(mx.float32)[None, None, None]
    return q, mx.full((1, 1, 1), weight), mx.array(keys), Span(len(scores) - 1, 1)


@pytest.mark.parametrize("key_format", KEY_FORMATS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 3, 16, 77])
def test_the_selection_is_the_whole_one(key_format, size, length):
    rng, heads, dim, total = np.random.default_rng(length), 3, 64, 331
    keys, _ = random_rows(rng, key_format, 2, total, dim, 0)
    q = random(rng, (2, length, heads, dim), mx.bfloat16)
    weights = random(rng, (2, length, heads))
    for start in (None, mx.array([0, 17]), mx.array([total - length - 30, 200])):
        check(indexer(heads, dim), size, q, weights, keys, Span(total - length, length, start))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("length", [1, 4, 50])
def test_on_metal(size, length):
    rng, heads, dim, total = np.random.default_rng(length), 2, 64, 300
    q, weights = random(rng, (1, length, heads, dim)), random(rng, (1, length, heads))
    keys, _ = random_rows(rng, "bf16", 1, total, dim, 0)
    with metal():
        check(indexer(heads, dim), size, q, weights, keys, Span(total - length, length))


NAN, INF = np.nan, np.inf
COLUMNS = np.arange(200)
SCORES = {
    "all equal": np.ones(200),
    "two values": COLUMNS % 2,
    "equal across every cut": np.where(abs(COLUMNS % 50 - 25) > 22, 1.0, 0.0),
    "the best in one share": np.where(COLUMNS < 30, 2.0, 1.0),
    "NaN and numbers": np.where(COLUMNS % 3, NAN, 1.0),
    "NaN but few": np.where(np.isin(COLUMNS, [3, 99, 100, 199]), 1.0, NAN),
    "infinite": np.where(COLUMNS % 2, INF, 1.0),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_equal_scores_and_those_that_are_no_numbers(name, size):
    """With a negative weight infinite scores are -inf, which rank with NaN."""
    for weight in (1.0, -1.0, NAN):
        check(indexer(1, 64), size, *from_scores(SCORES[name], weight))


def test_shares_with_fewer_keys_than_are_selected():
    """Of 25 keys; and where padding leaves the first share none, or one."""
    rng = np.random.default_rng(0)
    for total, starts in ((25, None), (60, [30, 29]), (60, [0, 59]), (60, [36, 35])):
        q, weights = random(rng, (2, 1, 2, 64)), random(rng, (2, 1, 2))
        keys, _ = random_rows(rng, "bf16", 2, total, 64, 0)
        start = None if starts is None else mx.array(starts)
        check(indexer(2, 64), 2, q, weights, keys, Span(total - 1, 1, start))


@pytest.mark.parametrize(
    "order", [lambda found: found[..., ::-1], lambda found: mx.roll(found, TOPK, -1)]
)
def test_a_wrong_merge_is_noticed(monkeypatch, order):
    """Where the last key, or the last rank, goes first among equals."""
    whole, given = indexer(1, 64), from_scores(SCORES["equal across every cut"])
    check(whole, 2, *given)
    monkeypatch.setattr(mx, "sort", lambda found, axis: order(found))
    assert not np.array_equal(of_ranks(whole, 2, *given)[0], np.array(whole.select(*given)))


def test_when_it_pays(monkeypatch):
    """As the table in `glm_fused.models.shard` says, of GLM-5.2's sizes."""
    monkeypatch.undo()
    sizes = 2048, 32 * 128, 2
    assert not keys_pay(1, 10_752, *sizes)
    assert keys_pay(1, 10_753, *sizes)
    assert pays(1, 512, 2049, *sizes)
    assert not pays(1, 20, 1 << 20, *sizes)  # 10 are no prompt for Metal
    with metal():
        assert not keys_pay(1, 155_648, *sizes)
        assert keys_pay(1, 155_649, *sizes)
        assert not pays(1, 512, 8_448, *sizes)
        assert pays(1, 512, 8_449, *sizes)
