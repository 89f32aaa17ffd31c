"""sparse_mla_decode, fused: it equals the reference bit for bit, and agrees with stock MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from long_context import KEY_FORMATS, digests, random, random_rows

import glm_fused
from glm_fused import ops
from glm_fused.ops import stock

SCALE = 0.07


def fused(q, rows, selected, rank, start=None, reference=False):
    out = ops.sparse_mla_decode(
        q, *rows, selected, rank=rank, scale=SCALE, start=start, reference=reference
    )
    mx.eval(out)
    return out


def random_selection(rng, b, length, total, k) -> mx.array:
    """A selection of ascending keys that the query sees, then -1."""
    out = np.full((b, length, k), -1, np.int32)
    for row in out.reshape(-1, k):
        count = rng.integers(0, k + 1)
        keys = np.sort(rng.permutation(total)[:count])
        row[: len(keys)] = keys
    return mx.array(out)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_fused_equals_reference(data):
    draw = data.draw
    b, length, heads = draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    rank, rope = draw(st.integers(1, 150)), draw(st.integers(0, 40))
    total = length + draw(st.integers(0, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = random_rows(rng, draw(st.sampled_from(KEY_FORMATS)), b, total, rank, rope)
    dtype = draw(st.sampled_from([mx.float32, mx.float16, mx.bfloat16]))
    q = random(rng, (b, length, heads, rank + rope), dtype)
    start = draw(st.none() | st.lists(st.integers(0, total - 1), min_size=b, max_size=b))
    start = None if start is None else mx.array(start)
    k = draw(st.integers(1, 200))
    selected = random_selection(rng, b, length, total, k) if draw(st.booleans()) else None
    found = fused(q, rows, selected, rank, start)
    assert np.isfinite(np.array(found)).all()
    assert_same_bits(found, fused(q, rows, selected, rank, start, reference=True))


@pytest.mark.parametrize("kv_format", KEY_FORMATS)
@pytest.mark.parametrize("sparse", [True, False])
def test_glm_geometry(kv_format, sparse):
    rng = np.random.default_rng(1)
    rows = random_rows(rng, kv_format, 1, 300, 512, 64)
    q = random(rng, (1, 2, 64, 576), mx.bfloat16)
    selected = random_selection(rng, 1, 2, 300, 150) if sparse else None
    found = fused(q, rows, selected, 512)
    assert_same_bits(found, fused(q, rows, selected, 512, reference=True))
    expected = stock.sparse_mla_decode(q, *rows, selected, 512, SCALE)
    assert mx.abs(found - expected).max().item() <= 2e-5


@pytest.mark.parametrize("count", [1, 5, 16])
def test_a_batch_equals_its_tokens(count):
    rng = np.random.default_rng(count)
    rows = random_rows(rng, "bf16", 2, 500, 128, 32)
    q = random(rng, (2, count, 6, 160), mx.bfloat16)
    selected = random_selection(rng, 2, count, 500, 130)
    together, dense = fused(q, rows, selected, 128), fused(q, rows, None, 128)
    for b in range(2):
        for i in range(count):
            seen = [a[b : b + 1, : 501 - count + i] for a in rows]
            token = q[b : b + 1, i : i + 1]
            alone = fused(token, seen, selected[b : b + 1, i : i + 1], 128)
            assert_same_bits(together[b, i], alone[0, 0])
            assert_same_bits(dense[b, i], fused(token, seen, None, 128)[0, 0])


def test_selecting_every_key_is_the_dense_form():
    rng = np.random.default_rng(2)
    rows = random_rows(rng, "fp8", 1, 333, 256, 64)
    q = random(rng, (1, 3, 10, 320))
    every = mx.broadcast_to(mx.arange(333, dtype=mx.int32), (1, 3, 333))
    assert_same_bits(fused(q, rows, every, 256), fused(q, rows, None, 256))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_matter(threads):
    rng = np.random.default_rng(3)
    rows = random_rows(rng, "bf16", 1, 2000, 512, 64)
    q = random(rng, (1, 1, 64, 576), mx.bfloat16)
    selected = mx.array(np.sort(rng.permutation(2000)[:1000]).astype(np.int32))[None, None]
    before = glm_fused.num_threads()
    expected = fused(q, rows, selected, 512)
    try:
        glm_fused.set_num_threads(threads)
        assert_same_bits(fused(q, rows, selected, 512), expected)
    finally:
        glm_fused.set_num_threads(before)


def test_unselected_rows_are_not_read():
    rng = np.random.default_rng(4)
    latents, ropes = random_rows(rng, "bf16", 1, 400, 128, 32)
    q = random(rng, (1, 1, 8, 160))
    chosen = np.sort(rng.permutation(300)[:99])
    selected = mx.array(chosen.astype(np.int32))[None, None]
    expected = fused(q, (latents[:, :300], ropes[:, :300]), selected, 128)
    unused = mx.array(np.setdiff1d(np.arange(400), chosen))
    latents[:, unused] = float("nan")
    ropes[:, unused] = float("inf")
    assert_same_bits(fused(q, (latents[:, :300], ropes[:, :300]), selected, 128), expected)


@pytest.mark.parametrize("strange", [[-1], [-7], [400], [2**31 - 1, -(2**31)]])
def test_entries_that_are_no_key_are_skipped(strange):
    """They keep their place, so the other keys' splits do not change."""
    rng = np.random.default_rng(5)
    rows = random_rows(rng, "int8", 1, 400, 128, 32)
    q = random(rng, (1, 1, 8, 160))
    keys = np.sort(rng.permutation(400)[:100])
    keys = np.insert(keys, [30] * len(strange), -1).astype(np.int32)
    expected = fused(q, rows, mx.array(keys)[None, None], 128)
    keys[keys == -1] = strange
    assert_same_bits(fused(q, rows, mx.array(keys)[None, None], 128), expected)
    later = mx.array([[[3, 399]]])
    assert_same_bits(
        fused(mx.concatenate([q, q], axis=1), rows, mx.repeat(later, 2, axis=1), 128)[:, 0],
        fused(q, (rows[0][:, :399], None), mx.array([[[3]]]), 128)[:, 0],
    )


def test_no_key_gives_zeros():
    rng = np.random.default_rng(6)
    rows = random_rows(rng, "bf16", 2, 20, 64, 16)
    q = random(rng, (2, 3, 4, 80))
    nothing = mx.full((2, 3, 7), -1, mx.int32)
    assert not fused(q, rows, nothing, 64).any().item()
    padded = fused(q, rows, None, 64, mx.array([0, 19]))
    assert padded[0].all(axis=-1).all().item()
    assert not padded[1, :2].any().item()
    assert_same_bits(padded, fused(q, rows, None, 64, mx.array([0, 19]), reference=True))


def test_large_scores_do_not_overflow():
    rng = np.random.default_rng(7)
    rows = random_rows(rng, "fp32", 1, 200, 64, 0)
    q = 1e4 * random(rng, (1, 1, 4, 64))
    found = fused(q, rows, None, 64)
    assert_same_bits(found, fused(q, rows, None, 64, reference=True))
    expected = stock.sparse_mla_decode(q, *rows, None, 64, SCALE)
    assert mx.abs(found - expected).max().item() <= 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_query_spoils_only_its_own_head(value):
    rng = np.random.default_rng(8)
    rows = random_rows(rng, "bf16", 1, 100, 64, 16)
    q = random(rng, (1, 2, 5, 80))
    expected = fused(q, rows, None, 64)
    q[0, 1, 3] = value
    found = fused(q, rows, None, 64)
    bad = np.isnan(np.array(found)).any(axis=-1)
    assert bad.tolist() == [[[False] * 5, [False, False, False, True, False]]]
    assert_same_bits(found[0, 0], expected[0, 0])
    again = np.isnan(np.array(fused(q, rows, None, 64, reference=True)))
    assert np.array_equal(np.isnan(np.array(found)), again)


def test_every_instruction_set_gives_the_same_bits():
    assert len(set(digests("mla").values())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": mx.zeros((1, 2, 80))}, r"q must be \[batch, queries, heads, rank \+ rope\]"),
        ({"rank": 81}, "rank 81, but has shape"),
        ({"latents": mx.zeros((1, 9, 63))}, r"latents must be \[1, keys, 64\]"),
        ({"latents": mx.zeros((1, 9, 64), mx.uint8)}, r"latents must be \[1, keys, 100\]"),
        ({"latents": mx.zeros((1, 1, 64))}, "at least 2, but has 1"),
        ({"latents": mx.zeros((1, 9, 100), mx.int8)}, "ropes must be None for latents of int8"),
        ({"ropes": None}, "ropes must be given"),
        ({"ropes": mx.zeros((1, 8, 16))}, r"ropes must have shape \(1,9,16\)"),
        ({"selected": mx.zeros((1, 3, 4), mx.int32)}, r"selected must have shape \(1,2,4\)"),
        ({"selected": mx.zeros((1, 2, 4))}, "selected must be int32"),
    ],
)
def test_errors(change, message):
    arguments = {
        "q": mx.zeros((1, 2, 3, 80)), "latents": mx.zeros((1, 9, 64)),
        "ropes": mx.zeros((1, 9, 16)), "selected": None, "rank": 64, "scale": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"\[sparse_mla_decode\] .*" + message):
        ops.sparse_mla_decode(**(arguments | change))
