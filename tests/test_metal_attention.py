"""The Metal kernels of indexer_topk and sparse_mla_decode, from Python to the shader, equal the CPU
bit for bit and are clean under the tracer."""

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import assert_same_bits
from long_context import KEY_FORMATS, random, random_rows
from metal_backend import GPU, cpu, metal, on_both, simulated_only

from glm_fused import ops
from glm_fused.ops import metal_sim, paths

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def random_selection(rng, b, queries, total, k):
    """A selection of visible keys, scattered -1 and keys that the query does not see."""
    chosen = np.stack([rng.permutation(total + 9)[:k] for _ in range(b * queries)]).astype(np.int32)
    return mx.array(np.where(chosen >= total + 5, -1, chosen).reshape(b, queries, k))


def attend(seed, kv_format, dtype=mx.bfloat16, b=1, queries=1, heads=5, rank=96, rope=32, total=200,
           k=130, start=None):  # fmt: skip
    rng = np.random.default_rng(seed)
    latents, ropes = random_rows(rng, kv_format, b, total, rank, rope)
    q = random(rng, (b, queries, heads, rank + rope), dtype)
    selected = None if k is None else random_selection(rng, b, queries, total, k)
    start = None if start is None else mx.array(start, mx.int32)
    return lambda: ops.sparse_mla_decode(
        q, latents, ropes, selected, rank=rank, scale=0.09, start=start
    )


def choose(seed, kv_format, dtype=mx.float32, b=1, queries=1, heads=4, dim=64, total=700, k=64,
           start=None, zeros=0.0):  # fmt: skip
    rng = np.random.default_rng(seed)
    keys, _ = random_rows(rng, kv_format, b, total, dim, 0)
    if zeros:
        keys = mx.where(mx.array(rng.random((b, total, 1)) < zeros), mx.zeros_like(keys), keys)
    q = random(rng, (b, queries, heads, dim), dtype)
    weights = random(rng, (b, queries, heads))
    start = None if start is None else mx.array(start, mx.int32)
    return lambda: ops.indexer_topk(q, keys, weights, k, scale=0.12, weight_scale=0.7, start=start)


@pytest.mark.parametrize("kv_format", KEY_FORMATS)
def test_attention_in_every_format(kv_format):
    assert_same_bits(*on_both(attend(1, kv_format, queries=2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_in_every_dtype(dtype):
    assert_same_bits(*on_both(attend(2, "bf16", dtype)))


@pytest.mark.parametrize(
    "sizes",
    [
        {"k": None, "b": 2, "queries": 3, "start": [0, 77]},
        {"k": None, "total": 1},
        {"k": 1, "heads": 1},
        {"k": 64, "heads": 65},
        {"k": 67, "heads": 17, "rank": 264, "rope": 8},
        {"k": 5, "heads": 80, "rank": 24, "rope": 0},
        {"k": 130, "heads": 16, "rank": 257, "rope": 1},
        {"k": 200, "rank": 31, "rope": 0, "heads": 3},
        {"k": 3, "rank": 65, "rope": 7},
        {"k": 20, "start": [200]},
        {"k": 70, "queries": 16, "heads": 2},
    ],
    ids=str,
)
def test_attention_sizes(sizes):
    assert_same_bits(*on_both(attend(3, "fp32", mx.float32, **sizes)))


def test_attention_in_pieces_of_scratch_is_the_same():
    run = attend(4, "bf16", b=3, queries=14, heads=64, rank=512, rope=64, total=300, k=256)
    assert_same_bits(*on_both(run))


def test_attention_at_the_real_geometry():
    run = attend(5, "fp8", heads=64, rank=512, rope=64, total=2500, k=2048)
    assert_same_bits(*on_both(run))


def test_a_nan_in_a_key_reaches_only_who_reads_it():
    rng = np.random.default_rng(6)
    latents, ropes = random_rows(rng, "fp32", 1, 150, 64, 16)
    latents[0, 100] = float("nan")
    q = random(rng, (1, 2, 3, 80))
    selected = mx.array([[[3, 100, 120, -1], [4, 99, 101, 149]]])
    there, here = on_both(
        lambda: ops.sparse_mla_decode(q, latents, ropes, selected, rank=64, scale=0.1)
    )
    assert mx.isnan(there[0, 0]).all() and not mx.isnan(there[0, 1]).any()
    assert_same_bits(there[0, 1], here[0, 1])


def test_lists_too_long_for_a_threadgroup_warn_and_are_right(monkeypatch):
    monkeypatch.setattr(paths, "_fallen_back", set())
    rng = np.random.default_rng(7)
    latents = random(rng, (1, 40, 8))
    q = random(rng, (1, 1, 1, 8))
    selected = mx.full((1, 1, 524289), -1, mx.int32)
    selected[0, 0, :40] = mx.arange(40)
    with metal(), pytest.warns(RuntimeWarning, match="524289 listed keys are more than 524288"):
        y = ops.sparse_mla_decode(q, latents, None, selected, rank=8, scale=1.0)
        mx.eval(y)
    with cpu():
        expected = ops.sparse_mla_decode(q, latents, None, None, rank=8, scale=1.0)
    np.testing.assert_allclose(np.array(y), np.array(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kv_format", KEY_FORMATS)
def test_indexer_in_every_format(kv_format):
    assert_same_selection(choose(10, kv_format, queries=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indexer_in_every_dtype(dtype):
    assert_same_selection(choose(11, "bf16", dtype))


@pytest.mark.parametrize(
    "sizes",
    [
        {"b": 2, "queries": 3, "start": [0, 300]},
        {"total": 1, "k": 1},
        {"total": 300, "k": 299},
        {"total": 300, "k": 300},
        {"total": 300, "k": 1000},
        {"k": 1, "heads": 33, "dim": 17},
        {"total": 257, "heads": 1, "dim": 1, "k": 40},
        {"queries": 16, "total": 400, "k": 130},
        {"start": [690], "k": 8},
    ],
    ids=str,
)
def test_indexer_sizes(sizes):
    assert_same_selection(choose(12, "fp32", **sizes))


@pytest.mark.parametrize("zeros", [0.5, 0.97, 1.0])
def test_indexer_on_plateaus_takes_the_lowest(zeros):
    assert_same_selection(choose(13, "fp32", zeros=zeros, total=1500, k=200))


def test_indexer_at_the_real_geometry():
    assert_same_selection(choose(14, "bf16", heads=32, dim=128, total=9000, k=2048))


def test_indexer_ranks_nan_and_infinity():
    rng = np.random.default_rng(15)
    keys = np.array(random(rng, (1, 500, 16)))
    keys[0, ::7] = np.nan
    keys[0, 3::50] = np.inf
    q, weights = random(rng, (1, 1, 2, 16)), random(rng, (1, 1, 2))
    assert_same_selection(lambda: ops.indexer_topk(q, mx.array(keys), weights, 60, scale=1.0))


SMALL = {"heads": 1, "dim": 8}  # it is the number of keys that matters


@pytest.mark.parametrize(
    "sizes",
    [
        {"total": 32769, "k": 64},
        {"total": 40001, "k": 2048, "b": 2, "queries": 2, "start": [0, 20000]},
        {"total": 50000, "k": 300, "zeros": 0.99},
        {"total": 50000, "k": 300, "zeros": 1.0},
        # Before the last keys no stretch has as many as are wanted.
        {"total": 70000, "k": 600, "start": [69400]},
        {"total": 70000, "k": 600, "start": [69300]},
        {"total": 70000, "k": 600, "start": [48700], "zeros": 1.0},
        {"total": 33000, "k": 33000},
        {"total": 70000, "k": 20000},
        {"total": 300000, "k": 2048, "zeros": 0.5},
        {"total": 300000, "k": 2048, "start": [280000]},
    ],
    ids=str,
)
def test_indexer_over_many_threadgroups(sizes):
    assert_same_selection(choose(17, "bf16", **SMALL, **sizes))


@simulated_only
@pytest.mark.parametrize(
    "total, grids",
    [
        (32768, [(2, 1)]),
        (32769, [(2, 3), (2, 1)]),
        (262144, [(2, 16), (2, 1)]),
        (262145, [(2, 17), (2, 3), (2, 1)]),
        (1 << 20, [(2, 64), (2, 8), (2, 1)]),
    ],
)
def test_selections_are_spread_over_threadgroups(total, grids):
    run = choose(18, "bf16", queries=2, total=total, k=2048, **SMALL)
    with metal(compiler=lambda *_: None):
        mx.eval(run())
    scores, *selections = metal_sim.take_launches()
    assert scores.groups == (-(-total // 256), 2, 1)
    assert [launch.groups[:2] for launch in selections] == grids
    assert selections[0].kernel.endswith(f"_true__{'true' if len(grids) == 1 else 'false'}_")


@pytest.mark.parametrize(
    "kv_format, dim, offset, unit",
    [
        ("bf16", 64, 0, 16),
        ("bf16", 64, 8, 16),
        ("bf16", 64, 4, 8),
        ("bf16", 64, 2, 4),
        ("bf16", 64, 1, 0),
        ("bf16", 60, 0, 0),
        ("fp16", 24, 0, 16),
        ("fp32", 40, 0, 16),
        ("fp32", 40, 1, 4),
        ("fp8", 128, 0, 4),
        ("fp8", 136, 0, 16),
        ("fp8", 128, 2, 0),
        ("int8", 128, 0, 4),
        ("int8", 124, 0, 0),
    ],
)
def test_keys_are_read_in_units_that_they_allow(kv_format, dim, offset, unit):
    """Rows begin `offset` elements into wider ones; a unit of 0 is value by value."""
    rng = np.random.default_rng(19)
    keys, _ = random_rows(rng, kv_format, 1, 300, dim, 0)
    wide = mx.zeros((1, 300, keys.shape[2] + offset), keys.dtype)
    wide[..., offset:] = keys
    q, weights = random(rng, (1, 1, 4, dim)), random(rng, (1, 1, 4))
    mx.eval(wide)
    assert_same_selection(lambda: ops.indexer_topk(q, wide[..., offset:], weights, 40, scale=1.0))
    if not GPU:
        assert metal_sim.take_launches()[0].kernel.endswith(f"_{unit}_")


@pytest.mark.slow
def test_indexer_of_a_million_keys():
    assert_same_selection(choose(16, "fp8", heads=2, dim=32, total=1 << 20, k=2048))


def assert_same_selection(run):
    there, here = on_both(run)
    assert np.array_equal(np.array(there), np.array(here))


@simulated_only
@pytest.mark.parametrize(
    "run, kernels",
    [
        (attend(20, "bf16", queries=2, k=70), ["mla_split", "mla_combine"]),
        (attend(21, "fp8", mx.float16, rank=40, rope=8, k=65), ["mla_split", "mla_combine"]),
        (attend(22, "int8", k=None, total=66, start=[5]), ["mla_split", "mla_combine"]),
        (choose(23, "bf16", queries=2, total=520), ["index_scores", "index_select"]),
        (choose(24, "fp8", heads=33, dim=24, zeros=0), ["index_scores", "index_select"]),
        (choose(25, "fp32", zeros=0.8), ["index_scores", "index_select"]),
    ],
    ids=["bf16", "fp8", "dense", "index", "index-fp8", "plateau"],
)
def test_two_launches_without_findings(run, kernels):
    with metal(trace=True):
        mx.eval(run())
    launches = metal_sim.take_launches()
    assert len(launches) == len(kernels)
    for launch, kernel in zip(launches, kernels, strict=True):
        assert launch.kernel.removeprefix("glm_fused_").startswith(kernel)
        assert launch.report.clean, launch.report
        assert launch.report.threadgroup_bytes < 32768


@simulated_only
@pytest.mark.parametrize("heads, blocks", [(1, 1), (16, 1), (17, 2), (64, 4)])
@pytest.mark.parametrize("rank", [96, 33])
def test_attention_reads_each_selected_row_twice_and_no_other(heads, blocks, rank):
    """16 heads read a row once for the scores and once for the values."""
    rope, k, total = 32, 128, 400
    run = attend(26, "bf16", heads=heads, rank=rank, rope=rope, k=None, start=[total - k],
                 total=total)  # fmt: skip
    with metal(trace=True):
        mx.eval(run())
    split = metal_sim.take_launches()[0]
    assert split.groups == (total // 64 + 1, blocks, 1)
    latents, ropes = (split.report.traffic[i] for i in (1, 2))
    assert latents.unique_read == k * rank * 2
    assert latents.read == 2 * blocks * latents.unique_read
    assert ropes.read == blocks * k * rope * 2


# What lies where a unit of so many bytes, of the dims, the first value in a wider row, and the
# values that are skipped after each, is all that can be read at once.
UNITS = [
    ("bf16", mx.bfloat16, 16, (0, 0), (24, 8)),
    ("bf16", mx.bfloat16, 8, (4, 0), (24, 8)),
    ("bf16", mx.bfloat16, 8, (0, 4), (24, 8)),
    ("fp16", mx.float16, 4, (2, 0), (24, 0)),
    ("bf16", mx.bfloat16, 0, (1, 7), (24, 8)),
    ("bf16", mx.bfloat16, 0, (0, 0), (28, 4)),
    ("bf16", mx.bfloat16, 0, (0, 0), (24, 12)),
    ("fp32", mx.bfloat16, 16, (4, 0), (8, 16)),
    ("fp32", mx.float16, 4, (1, 3), (8, 0)),
    ("fp8", mx.bfloat16, 4, (0, 0), (24, 8)),
    ("fp8", mx.bfloat16, 16, (0, 0), (400, 8)),
    ("fp8", mx.bfloat16, 8, (0, 8), (400, 8)),
    ("fp8", mx.bfloat16, 0, (2, 2), (400, 8)),
    ("int8", mx.bfloat16, 4, (0, 0), (16, 8)),
    ("int8", mx.bfloat16, 4, (4, 8), (16, 8)),
    ("int8", mx.bfloat16, 0, (1, 1), (16, 8)),
]


@simulated_only
@pytest.mark.parametrize("kv_format, dtype, unit, skipped, dims", UNITS, ids=str)
def test_attention_reads_in_the_widest_units_that_rows_allow(kv_format, dtype, unit, skipped, dims):
    rng = np.random.default_rng(28)
    rank, rope = dims
    latents, ropes = random_rows(rng, kv_format, 2, 70, rank, rope)
    wide = mx.pad(latents, [(0, 0), (0, 0), skipped])
    mx.eval(wide)
    latents = wide[..., skipped[0] : wide.shape[-1] - skipped[1]]
    q = random(rng, (2, 2, 3, rank + rope), dtype)
    with metal(trace=True):
        there = ops.sparse_mla_decode(q, latents, ropes, rank=rank, scale=0.1)
        mx.eval(there)
    split = metal_sim.take_launches()[0]
    assert split.report.clean, split.report
    assert split.kernel.rstrip("_").rpartition("_")[2] == str(unit)
    with cpu():
        assert_same_bits(there, ops.sparse_mla_decode(q, latents, ropes, rank=rank, scale=0.1))


@simulated_only
def test_indexer_reads_each_key_once():
    with metal(trace=True):
        mx.eval(choose(27, "bf16", heads=32, dim=64, total=700)())
    scores = metal_sim.take_launches()[0].report
    assert scores.traffic[2].read == scores.traffic[2].unique_read == 700 * 64 * 2
