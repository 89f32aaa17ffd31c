"""indexer_topk, fused: it equals the reference bit for bit, and numpy's stable sort."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from long_context import KEY_FORMATS, digests, random, random_rows

import glm_fused
from glm_fused import ops
from glm_fused.ops import stock

SCALE = 0.125


def both(q, keys, weights, k, start=None, scale=SCALE):
    """The fused result, after comparing it with the reference's."""
    fused = ops.indexer_topk(q, keys, weights, k, scale=scale, start=start, reference=False)
    mx.eval(fused)
    again = ops.indexer_topk(q, keys, weights, k, scale=scale, start=start, reference=True)
    assert fused.dtype == mx.int32
    assert mx.array_equal(fused, again).item()
    return np.array(fused)


def stable(scores: np.ndarray, k: int) -> np.ndarray:
    """The k best by a stable sort that takes NaN as -inf: ascending, then -1."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best = np.sort(np.argsort(-scores, kind="stable")[:k])
    return np.concatenate([best, np.full(k - len(best), -1)])


def from_scores(scores: np.ndarray, k: int) -> np.ndarray:
    """Select by given scores >= 0, which are the keys of one head of one dimension."""
    keys = mx.array(scores.astype(np.float32))[None, :, None]
    one = mx.ones((1, 1, 1, 1))
    return both(one, keys, mx.ones((1, 1, 1)), k, scale=1.0)[0, 0]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_fused_equals_reference(data):
    draw = data.draw
    b, length, heads = draw(st.integers(1, 2)), draw(st.integers(1, 16)), draw(st.integers(1, 20))
    dim, total = draw(st.integers(1, 140)), length + draw(st.integers(0, 500))
    k = draw(st.integers(1, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keys, _ = random_rows(rng, draw(st.sampled_from(KEY_FORMATS)), b, total, dim, 0)
    dtype = draw(st.sampled_from([mx.float32, mx.float16, mx.bfloat16]))
    start = draw(st.none() | st.lists(st.integers(0, total - 1), min_size=b, max_size=b))
    start = None if start is None else mx.array(start)
    q, weights = random(rng, (b, length, heads, dim), dtype), random(rng, (b, length, heads))
    both(q, keys, weights, k, start)


@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_selects_what_stock_mlx_selects(key_format):
    """The two round scores differently, so keys at the boundary may be swapped."""
    rng = np.random.default_rng(1)
    keys, _ = random_rows(rng, key_format, 2, 700, 64, 0)
    q, weights = random(rng, (2, 40, 8, 64)), random(rng, (2, 40, 8))
    start = mx.array([0, 30])
    found = both(q, keys, weights, 100, start)
    expected = np.array(stock.indexer_topk(q, keys, weights, 100, SCALE, start))
    for mine, theirs in zip(found.reshape(80, -1), expected.reshape(80, -1), strict=True):
        assert len(set(mine) & set(theirs)) >= len(set(theirs)) - 1


ADVERSARIAL = {
    "all equal": np.ones(900),
    "all zero": np.zeros(900),
    "zeros but three": np.where(np.isin(np.arange(900), [5, 400, 899]), 1.0, 0.0),
    "two values": np.arange(900) % 2,
    "same top digit": 1 + np.arange(900) % 7 * 2.0**-20,
    "neighbours": np.nextafter(np.ones(900, np.float32), np.float32(2)) - np.arange(900) % 2 * 2e-7,
    "ascending": np.arange(900),
    "descending": np.arange(900)[::-1],
    "infinite": np.where(np.arange(900) % 3 == 0, np.inf, np.arange(900)),
    "NaN": np.where(np.arange(900) % 2 == 0, np.nan, np.arange(900)),
    "mostly NaN": np.where(np.arange(900) < 880, np.nan, 1.0),
    "all NaN": np.full(900, np.nan),
    "subnormal": np.arange(900) % 5 * 1e-44,
    "one": np.ones(1),
}


@pytest.mark.parametrize("k", [1, 2, 64, 299, 899, 900, 901])
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_top_k_of_adversarial_scores(name, k):
    scores = ADVERSARIAL[name].astype(np.float32)
    assert np.array_equal(from_scores(scores, k), select(scores, k))


def select(scores: np.ndarray, k: int) -> np.ndarray:
    if len(scores) <= k:  # all keys, whatever their scores
        return np.concatenate([np.arange(len(scores)), np.full(k - len(scores), -1)])
    return stable(scores, k)


def test_negative_scores_and_signed_zeros():
    """With w < 0 every score relu(x) * w is -0 or below."""
    rng = np.random.default_rng(2)
    values = rng.integers(-3, 4, 500).astype(np.float32)
    keys, one = mx.array(values)[None, :, None], mx.ones((1, 1, 1, 1))
    found = both(one, keys, -mx.ones((1, 1, 1)), 300, scale=1.0)[0, 0]
    assert np.array_equal(found, stable(-np.maximum(values, 0), 300))


@pytest.mark.parametrize("duplicates", [2, 1000])
def test_a_million_keys(duplicates):
    rng = np.random.default_rng(3)
    scores = rng.integers(0, (1 << 20) // duplicates, 1 << 20).astype(np.float32)
    fused = ops.indexer_topk(
        mx.ones((1, 1, 1, 1)), mx.array(scores)[None, :, None], mx.ones((1, 1, 1)), 2048, scale=1.0
    )
    assert np.array_equal(np.array(fused)[0, 0], stable(scores, 2048))


def test_queries_are_causal_and_do_not_depend_on_each_other():
    rng = np.random.default_rng(4)
    keys = random(rng, (2, 600, 48), mx.bfloat16)
    q, weights = random(rng, (2, 16, 6, 48)), random(rng, (2, 16, 6))
    together = both(q, keys, weights, 64)
    for i in range(16):
        at = slice(i, i + 1)
        alone = ops.indexer_topk(q[:, at], keys[:, : 585 + i], weights[:, at], 64, scale=SCALE)
        assert np.array_equal(together[:, at], np.array(alone))
    for row in range(2):
        at = slice(row, row + 1)
        alone = ops.indexer_topk(q[at], keys[at], weights[at], 64, scale=SCALE)
        assert np.array_equal(together[at], np.array(alone))


def test_the_factor_of_the_weights_is_their_product():
    """Rounded to fp32; near ties, of keys that differ in the last bits, show it."""
    rng = np.random.default_rng(11)
    keys = 1 + 1e-6 * mx.abs(random(rng, (1, 700, 24)))
    q, weights = mx.abs(random(rng, (1, 3, 8, 24))), mx.abs(random(rng, (1, 3, 8)))
    expected = ops.indexer_topk(q, keys, weights * 0.3, 90, scale=SCALE)
    for reference in (False, True):
        found = ops.indexer_topk(
            q, keys, weights, 90, scale=SCALE, weight_scale=0.3, reference=reference
        )
        assert mx.array_equal(found, expected).item()
    other = ops.indexer_topk(q, keys, weights, 90, scale=SCALE)
    assert not mx.array_equal(other, expected).item()


def test_a_prefill_equals_its_tokens():
    rng = np.random.default_rng(5)
    keys, length = random(rng, (1, 300, 32), mx.bfloat16), 300
    q, weights = random(rng, (1, length, 4, 32)), random(rng, (1, length, 4))
    together = both(q, keys, weights, 40)
    for i in range(0, length, 37):
        at = slice(i, i + 1)
        alone = ops.indexer_topk(q[:, at], keys[:, : i + 1], weights[:, at], 40, scale=SCALE)
        assert np.array_equal(together[:, at], np.array(alone))
    assert (together[0, 10] == [*range(11), *[-1] * 29]).all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads):
    rng = np.random.default_rng(6)
    keys = random(rng, (1, 5000, 128), mx.bfloat16)
    q, weights = random(rng, (1, 3, 32, 128)), random(rng, (1, 3, 32))
    before = glm_fused.num_threads()
    expected = np.array(ops.indexer_topk(q, keys, weights, 777, scale=SCALE))
    try:
        glm_fused.set_num_threads(threads)
        found = np.array(ops.indexer_topk(q, keys, weights, 777, scale=SCALE))
    finally:
        glm_fused.set_num_threads(before)
    assert np.array_equal(found, expected)


def test_memory_around_the_keys_is_not_read():
    """The cache's spare rows and the padding hold NaN; strided and transposed keys work."""
    rng = np.random.default_rng(7)
    keys = random(rng, (2, 400, 40), mx.bfloat16)
    buffer = mx.full((2, 500, 40), float("nan"), mx.bfloat16)
    buffer[:, :400] = keys
    q, weights = random(rng, (2, 2, 5, 40)), random(rng, (2, 2, 5))
    start = mx.array([0, 50])
    expected = both(q, keys, weights, 70, start)
    assert np.array_equal(both(q, buffer[:, :400], weights, 70, start), expected)
    transposed = mx.contiguous(keys.swapaxes(1, 2)).swapaxes(1, 2)
    assert np.array_equal(both(q, transposed, weights, 70, start), expected)
    buffer[1, :50] = float("nan")
    assert np.array_equal(both(q, buffer[:, :400], weights, 70, start), expected)


PREFILL = """
import mlx.core as mx
from glm_fused import ops
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
q, keys = mx.ones((1, 2048, 1, 1)), mx.random.uniform(shape=(1, 1 << 16, 1))
mx.eval(q, keys, ops.indexer_topk(q[:, :1], keys, mx.ones((1, 1, 1)), 8, scale=1.0))
before = peak()
mx.eval(ops.indexer_topk(q, keys, mx.ones((1, 2048, 1)), 8, scale=1.0))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_prefill_holds_a_bounded_tile_of_scores():
    """All scores of 2048 queries over 65,536 keys would be 512 MiB."""
    run = subprocess.run(
        [sys.executable, "-c", PREFILL],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) <= 72 << 20


def test_a_nan_or_infinite_query_selects_the_lowest_keys():
    rng = np.random.default_rng(8)
    keys, weights = random(rng, (1, 100, 16)), mx.ones((1, 1, 4))
    for value in (float("nan"), float("inf")):
        found = both(mx.full((1, 1, 4, 16), value), keys, weights, 10)[0, 0]
        assert found.min() >= 0
        assert (np.diff(found) > 0).all()
        if value != value:
            assert found.tolist() == list(range(10))


def test_every_instruction_set_gives_the_same_bits():
    assert len(set(digests("indexer").values())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": mx.zeros((1, 2, 8))}, r"q must be \[batch, queries, heads, dim\]"),
        ({"q": mx.zeros((1, 2, 3, 8), mx.int32)}, "q must be float32"),
        ({"keys": mx.zeros((1, 9, 7))}, r"keys must be \[1, keys, 8\] but has shape \(1,9,7\)"),
        ({"keys": mx.zeros((1, 9, 8), mx.uint8)}, r"keys must be \[1, keys, 12\]"),
        ({"keys": mx.zeros((1, 9, 8), mx.int32)}, "keys must be float32, .* but is int32"),
        ({"keys": mx.zeros((1, 1, 8))}, "at least 2, but has 1"),
        ({"weights": mx.zeros((1, 2, 4))}, r"weights must have shape \(1,2,3\)"),
        ({"k": 0}, "k must be at least 1 but is 0"),
        ({"start": mx.zeros((2,), mx.int32)}, r"start must have shape \(1\)"),
        ({"start": mx.zeros((1,))}, "start must be int32"),
    ],
)
def test_errors(change, message):
    arguments = {
        "q": mx.zeros((1, 2, 3, 8)), "keys": mx.zeros((1, 9, 8)), "k": 4,
        "weights": mx.zeros((1, 2, 3)), "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"\[indexer_topk\] .*" + message):
        ops.indexer_topk(**(arguments | change))
