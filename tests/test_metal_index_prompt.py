"""A prompt's indexer on Metal: scores whose error against float64 is the decode kernel's, the exact
choice among them, and no key tile that is not needed."""

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import assert_same_bits
from long_context import KEY_FORMATS, random, random_rows
from metal_backend import GPU, cpu, metal, simulated_only
from test_metal_attention import DTYPES

from glm_fused import _ext, ops
from glm_fused.formats import kv_rows
from glm_fused.ops import metal_sim

PROMPT = 17  # queries, the fewest that are one
TILE = 32  # queries
KEYS = 128  # of a tile


def on_metal(op, **settings):
    """The op's array and its launches, those of a prompt."""
    with metal(**settings):
        y = op()
        mx.eval(y)
    if GPU:
        return y, []
    launches = metal_sim.take_launches()
    names = [launch.kernel.removeprefix("glm_fused_") for launch in launches]
    assert names[0].startswith("index_prompt")
    assert all(name.startswith(("index_prompt", "index_select")) for name in names)
    return y, launches


def whole_rows(rng, kv_format, b, total, dim):
    """Keys of small integers, as they are and in a format that holds them as such."""
    values = rng.integers(-2, 3, (b, total, dim)).astype(np.float32)
    if kv_format in kv_rows.PACKED:
        values[..., 0] = {"fp8": 448, "int8": 127}[kv_format]  # which makes the scale 1
        keys = kv_rows.pack(mx.array(values), None, kv_format)
        assert np.array_equal(np.array(kv_rows.unpack(keys, dim)[0]), values)
        return keys
    return mx.array(values).astype(kv_rows.FLOATS[kv_format])


def check(seed, kv_format, dtype=mx.bfloat16, b=1, queries=PROMPT, heads=4, dim=64, total=300,
          k=40, start=None):  # fmt: skip
    """Of integers every order gives the same scores, many of them alike: those of the CPU."""
    rng = np.random.default_rng(seed)
    keys = whole_rows(rng, kv_format, b, total, dim)
    q = mx.array(rng.integers(-2, 3, (b, queries, heads, dim))).astype(dtype)
    weights = mx.array(rng.integers(-3, 4, (b, queries, heads))).astype(mx.float32)
    starts = None if start is None else mx.array(start, mx.int32)

    def op():
        how = {"scale": 0.5, "weight_scale": 0.25, "start": starts}
        return ops.indexer_topk(q, keys, weights, k, **how)

    there, launches = on_metal(op, trace=True)
    for launch in launches:
        assert launch.report.clean, launch.report
        assert launch.report.threadgroup_bytes < 32768
    with cpu():
        assert_same_bits(there, op())


@pytest.mark.parametrize("kv_format", KEY_FORMATS)
def test_every_format(kv_format):
    check(1, kv_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    check(2, "bf16", dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        {"b": 2, "queries": 33, "start": [0, 140]},
        {"queries": TILE, "total": TILE, "k": 5},
        {"queries": 70, "total": 257, "k": 250},
        {"total": 300, "k": 1000},
        {"k": 1, "heads": 1, "dim": 1},
        {"k": 30, "heads": 33, "dim": 17},
        {"k": 20, "dim": 60, "queries": 20},
        {"dim": 128, "total": 385, "queries": 40},
        {"dim": 104, "heads": 3},
        {"start": [290], "k": 8},
        {"start": [256], "k": 8, "queries": 40},
    ],
    ids=str,
)
def test_sizes(sizes):
    check(3, "fp32", mx.float32, **sizes)


def test_many_threadgroups_select():
    check(4, "bf16", heads=1, dim=8, total=33000, k=64, queries=20)


@simulated_only
def test_scratch_memory_is_bounded():
    """Some queries at a time, in the same memory each time, are those of the plan."""
    queries, total, k = 70, 200000, 600
    rng = np.random.default_rng(5)
    keys, _ = random_rows(rng, "bf16", 1, total, 8, 0)
    q, weights = random(rng, (1, queries, 1, 8)), random(rng, (1, queries, 1))
    mx.eval(keys, q, weights)
    planned = _ext.index_scratch_bytes(queries, total, k)
    assert planned <= 64 << 20
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with metal(compiler=lambda *_: None):
        mx.eval(ops.indexer_topk(q, keys, weights, k, scale=1.0))
    taken = mx.get_peak_memory() - before
    assert 0.9 * planned < taken < planned + (1 << 20)
    scores = [x.groups for x in metal_sim.take_launches() if "index_prompt" in x.kernel]
    assert scores == [(-(-total // 256) * 2, 1, 1)] * 3


def in_float64(q, keys, weights, scale):
    """The scores [queries, keys] without any rounding, of one sequence."""
    q, keys, weights = (
        np.array(a.astype(mx.float32)).astype(np.float64)[0] for a in (q, keys, weights)
    )
    dots = np.einsum("qhd,kd->qhk", q, keys) * scale
    return np.einsum("qh,qhk->qk", weights, np.maximum(dots, 0))


def words_of(launch, queries, total):
    """What a launch wrote of each query and key."""
    words = np.frombuffer(launch.outputs[4], np.uint32)
    return words.reshape(-1, -(-total // 256) * 256)[:queries, :total]


def scores_of(words):
    """The scores whose order words have."""
    bits = np.where(words & 0x80000000, words & 0x7FFFFFFF, ~words).astype(np.uint32)
    return bits.view(np.float32).astype(np.float64)


@simulated_only
@pytest.mark.parametrize("kv_format", ["bf16", "fp32"])
@pytest.mark.parametrize("heads, dim", [(32, 128), (4, 32), (8, 17)])
def test_error_is_no_larger_than_the_decode_kernels(heads, dim, kv_format):
    """Of all scores, against float64; what is chosen are the largest of them."""
    queries, total, k = 20, 600, 100
    rng = np.random.default_rng(6)
    keys, _ = random_rows(rng, kv_format, 1, total, dim, 0)
    q, weights = (
        random(rng, (1, queries, heads, dim), mx.bfloat16),
        random(rng, (1, queries, heads)),
    )
    scale = float(np.float32(dim**-0.5))
    chosen, (ours, _) = on_metal(
        lambda: ops.indexer_topk(q, keys, weights, k, scale=scale), keep_outputs=True
    )
    decode = np.zeros((queries, total), np.uint32)
    for first in (0, 10):  # it takes no more than 16
        end, seen = first + 10, total - 10 + first
        with metal(keep_outputs=True):
            own = q[:, first:end], keys[:, :seen], weights[:, first:end]
            mx.eval(ops.indexer_topk(*own, k, scale=scale))
        half = metal_sim.take_launches()[0]
        assert "index_scores" in half.kernel
        decode[first:end, :seen] = words_of(half, 10, seen)
    words = words_of(ours, queries, total)
    visible = np.arange(total) <= total - queries + np.arange(queries)[:, None]
    truth = in_float64(q, keys, weights, scale)[visible]

    def error(found):
        return np.sqrt(np.mean((scores_of(found)[visible] - truth) ** 2))

    assert error(words) <= error(decode)
    for own, seen, row in zip(words, visible, np.array(chosen)[0], strict=True):
        best = np.argsort(-own[seen].astype(np.int64), kind="stable")[:k]
        assert np.array_equal(np.sort(best), row)


def test_a_query_does_not_depend_on_company_or_on_time():
    """The same choice, of scores that are nearly alike, whichever queries are beside it."""
    rng = np.random.default_rng(7)
    keys = 1 + 1e-6 * random(rng, (1, 500, 64))
    q, weights = random(rng, (1, 70, 5, 64)), random(rng, (1, 70, 5))

    def run(first, end):
        seen = 430 + end
        return on_metal(
            lambda: ops.indexer_topk(
                q[:, first:end], keys[:, :seen], weights[:, first:end], 100, scale=0.1
            )
        )[0]

    y = run(0, 70)
    assert_same_bits(y, run(0, 70))
    assert_same_bits(y[:, 23:], run(23, 70))
    assert_same_bits(y[:, 5:60], run(5, 60))


def test_nan_and_infinity_are_ranked_as_ever():
    rng = np.random.default_rng(8)
    keys = np.array(random(rng, (1, 500, 16)))
    keys[0, ::7] = np.nan
    keys[0, 3::50] = np.inf
    q = np.round(np.array(random(rng, (1, PROMPT, 2, 16))))
    q[0, 5, 0, 3] = np.nan  # of one query
    weights = random(rng, (1, PROMPT, 2))

    def op():
        keys_of_integers = mx.array(np.round(keys))
        return ops.indexer_topk(mx.array(q), keys_of_integers, mx.round(weights), 60, scale=1.0)

    there, _ = on_metal(op)
    with cpu():
        assert_same_bits(there, op())


def test_keys_that_are_no_ones_are_not_seen():
    """Rows before the start and what lies beside a row are NaN."""
    rng = np.random.default_rng(9)
    wide = mx.full((1, 400, 48), float("nan"))
    wide[:, 150:, 8:40] = mx.array(rng.integers(-2, 3, (1, 250, 32)))
    q = mx.array(rng.integers(-2, 3, (1, 40, 3, 32))).astype(mx.float32)
    weights, start = mx.ones((1, 40, 3)), mx.array([150], mx.int32)
    mx.eval(wide)

    def op():
        return ops.indexer_topk(q, wide[..., 8:40], weights, 50, scale=1.0, start=start)

    there, launches = on_metal(op, trace=True)
    assert all(launch.report.clean for launch in launches)
    with cpu():
        assert_same_bits(there, op())


@pytest.mark.parametrize(
    "kv_format, dim, offset, unit",
    [("bf16", 64, 8, 16), ("bf16", 64, 4, 8), ("bf16", 64, 2, 4), ("bf16", 64, 1, 0),
     ("fp8", 128, 0, 4), ("int8", 124, 0, 0)],
)  # fmt: skip
def test_keys_are_read_in_units_that_they_allow(kv_format, dim, offset, unit):
    """Rows begin `offset` elements into wider ones; a unit of 0 is value by value."""
    rng = np.random.default_rng(10)
    keys = whole_rows(rng, kv_format, 1, 300, dim)
    wide = mx.zeros((1, 300, keys.shape[2] + offset), keys.dtype)
    wide[..., offset:] = keys
    q = mx.array(rng.integers(-2, 3, (1, PROMPT, 2, dim))).astype(mx.bfloat16)
    weights = mx.ones((1, PROMPT, 2))
    mx.eval(wide)

    def op():
        return ops.indexer_topk(q, wide[..., offset:], weights, 40, scale=1.0)

    there, launches = on_metal(op)
    with cpu():
        assert_same_bits(there, op())
    assert GPU or launches[0].kernel.endswith(f"_{unit}_")


@simulated_only
@pytest.mark.parametrize("queries, total, start", [(70, 700, 0), (70, 700, 300), (380, 400, 0)])
def test_each_key_is_read_once_for_a_tile_of_queries(queries, total, start):
    """Those of tiles that a query of the tile sees, and queries once for each such tile; nothing
    where all keys are chosen."""
    heads, dim, k = 3, 24, 90
    rng = np.random.default_rng(11)
    keys, _ = random_rows(rng, "bf16", 1, total, dim, 0)
    q = random(rng, (1, queries, heads, dim), mx.bfloat16)
    weights = random(rng, (1, queries, heads))
    _, (scores, _) = on_metal(
        lambda: ops.indexer_topk(q, keys, weights, k, scale=1.0, start=mx.array([start], mx.int32)),
        trace=True,
    )
    read = read_queries = 0
    for first in range(0, queries, TILE):
        count = min(TILE, queries - first)
        seen = total - queries + first + count - start
        if seen > k:
            tiles = -(-(start + seen) // KEYS) - start // KEYS
            read += seen * dim * 2
            read_queries += count * tiles * heads * dim * 2
    traffic = scores.report.traffic
    assert traffic[2].read == read
    assert traffic[2].unique_read == (total - start) * dim * 2
    assert traffic[0].read == read_queries


def test_keys_that_are_too_wide_take_the_decode_kernels():
    rng = np.random.default_rng(12)
    keys, _ = random_rows(rng, "fp32", 1, 300, 136, 0)
    q, weights = random(rng, (1, PROMPT, 2, 136)), random(rng, (1, PROMPT, 2))

    def op():
        return ops.indexer_topk(q, keys, weights, 40, scale=0.1)

    with metal():
        y = op()
        mx.eval(y)
    assert GPU or "index_scores" in metal_sim.take_launches()[0].kernel
    with cpu():
        assert_same_bits(y, op())
