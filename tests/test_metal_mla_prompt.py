"""A prompt's attention on Metal: the error against float64 is the decode kernels', and each listed
row is read once for 16 heads."""

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import assert_same_bits
from long_context import KEY_FORMATS, random, random_rows
from metal_backend import GPU, cpu, metal, simulated_only
from test_metal_attention import DTYPES, attend, random_selection

from glm_fused import ops
from glm_fused.formats import kv_rows
from glm_fused.ops import metal_sim

PROMPT = 17  # queries, the fewest that are one


def on_metal(op, **settings):
    """The op's array and its one launch."""
    with metal(**settings):
        y = op()
        mx.eval(y)
    if GPU:
        return y, None
    (launch,) = metal_sim.take_launches()
    assert launch.kernel.removeprefix("glm_fused_").startswith("mla_prompt")
    return y, launch


def in_float64(q, latents, ropes, selected, rank, scale, start=None):
    """Attention without any rounding."""
    if latents.dtype in kv_rows.PACKED.values():
        latents, ropes = kv_rows.unpack(latents, rank)
    rows = latents if ropes is None else mx.concatenate([latents, ropes], axis=-1)
    q, rows = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (q, rows))
    (b, queries, heads, _), total = q.shape, rows.shape[1]
    y = np.zeros((b, queries, heads, rank))
    for i, j in np.ndindex(b, queries):
        keys = np.arange(total) if selected is None else np.array(selected)[i, j]
        low, high = 0 if start is None else start[i], total - queries + j
        keys = keys[(keys >= low) & (keys <= high)]
        if len(keys):
            scores = q[i, j] @ rows[i, keys].T * scale
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            y[i, j] = weights / weights.sum(axis=-1, keepdims=True) @ rows[i, keys, :rank]
    return y


def error(y, truth):
    return np.sqrt(np.mean((np.array(y).astype(np.float64) - truth) ** 2))


def check(seed, kv_format, dtype=mx.bfloat16, b=1, queries=PROMPT, heads=5, rank=96, rope=32,
          total=200, k=130, start=None, most=1.25):  # fmt: skip
    """The error is at most so many times the decode kernels'; a few keys leave rounding alone."""
    rng = np.random.default_rng(seed)
    latents, ropes = random_rows(rng, kv_format, b, total, rank, rope)
    q = random(rng, (b, queries, heads, rank + rope), dtype)
    selected = None if k is None else random_selection(rng, b, queries, total, k)
    starts = None if start is None else mx.array(start, mx.int32)

    def op():
        how = {"rank": rank, "scale": 0.09, "start": starts}
        return ops.sparse_mla_decode(q, latents, ropes, selected, **how)

    y, launch = on_metal(op, trace=True)
    assert launch is None or launch.report.clean, launch.report
    with cpu():
        decode = op()
    truth = in_float64(q, latents, ropes, selected, rank, np.float64(np.float32(0.09)), start)
    assert error(y, truth) <= most * error(decode, truth)
    return launch


@pytest.mark.parametrize("kv_format", KEY_FORMATS)
def test_every_format(kv_format):
    check(1, kv_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    check(2, "bf16", dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        {"k": None, "b": 2, "start": [0, 77]},
        {"k": None, "total": PROMPT},
        {"k": 1, "heads": 1},
        {"k": 64, "heads": 33, "queries": 20},
        {"k": 67, "heads": 17, "rank": 264, "rope": 8},
        {"k": 5, "heads": 16, "rank": 24, "rope": 0},
        {"k": 130, "heads": 16, "rank": 257, "rope": 1},
        {"k": 200, "rank": 31, "rope": 0, "heads": 3},
        {"k": 3, "rank": 65, "rope": 7},
        {"k": 20, "start": [190]},
        {"k": 80, "heads": 16, "rank": 512, "rope": 64},
    ],
    ids=str,
)
def test_sizes(sizes):
    check(3, "fp32", mx.float32, **sizes)


@pytest.mark.parametrize("k", [None, 700])
def test_error_of_long_lists_at_the_real_widths(k):
    check(4, "bf16", heads=16, rank=512, rope=64, total=1500, k=k, most=1)


def test_a_query_does_not_depend_on_company_or_on_time():
    """The same bits whichever queries are beside it, and each time."""
    rng = np.random.default_rng(5)
    latents, ropes = random_rows(rng, "bf16", 1, 90, 64, 16)
    q = random(rng, (1, 40, 20, 80), mx.bfloat16)

    def run(first):
        return on_metal(
            lambda: ops.sparse_mla_decode(q[:, first:], latents, ropes, rank=64, scale=0.1)
        )[0]

    y = run(0)
    assert_same_bits(y, run(0))
    assert_same_bits(y[:, 20:], run(20))


def test_a_nan_in_a_key_reaches_only_who_reads_it():
    rng = np.random.default_rng(6)
    latents, ropes = random_rows(rng, "fp32", 1, 150, 64, 16)
    latents[0, 100] = float("nan")
    q = random(rng, (1, PROMPT, 3, 80))
    rows = [[3, 100, 120, -1] if i == 5 else [4, 99, 101, 149] for i in range(PROMPT)]
    y, _ = on_metal(
        lambda: ops.sparse_mla_decode(q, latents, ropes, mx.array([rows]), rank=64, scale=0.1)
    )
    others = mx.array([i for i in range(PROMPT) if i != 5])
    assert mx.isnan(y[0, 5]).all() and not mx.isnan(y[0, others]).any()


@simulated_only
@pytest.mark.parametrize("heads, blocks", [(1, 1), (16, 1), (17, 2), (64, 4)])
@pytest.mark.parametrize("rank", [96, 33])
def test_each_listed_row_is_read_once_and_no_other(heads, blocks, rank):
    """For each 16 heads of a query; of what no query lists, nothing is read."""
    rng = np.random.default_rng(7)
    total, k, rope = 400, 70, 32
    latents, ropes = random_rows(rng, "bf16", 1, total, rank, rope)
    q = random(rng, (1, PROMPT, heads, rank + rope), mx.bfloat16)
    some = rng.permutation(total - PROMPT)[:120]
    lists = np.stack([np.sort(rng.permutation(some)[:k]) for _ in range(PROMPT)])
    selected = mx.array(np.pad(lists, [(0, 0), (0, 100)], constant_values=-1)[None], mx.int32)
    _, launch = on_metal(
        lambda: ops.sparse_mla_decode(q, latents, ropes, selected, rank=rank, scale=0.1), trace=True
    )
    assert launch.groups == (blocks, PROMPT, 1)
    for index, width in ((1, rank), (2, rope)):
        traffic = launch.report.traffic[index]
        assert traffic.unique_read == len(np.unique(lists)) * width * 2
        assert traffic.read == blocks * lists.size * width * 2


@simulated_only
def test_keys_that_are_not_visible_yet_are_not_read():
    """Of every visible key, each query reads its own ones: none after it."""
    start, total, rank = 30, 100, 64
    run = attend(8, "bf16", queries=40, heads=3, rank=rank, rope=0, k=None, total=total,
                 start=[start])  # fmt: skip
    _, launch = on_metal(run, trace=True)
    seen = sum(total - 40 + i + 1 - start for i in range(40))
    assert launch.report.traffic[1].read == seen * rank * 2


def test_rows_that_are_too_wide_take_the_decode_kernels():
    rng = np.random.default_rng(9)
    for rank, rope in ((520, 0), (8, 65)):
        latents, ropes = random_rows(rng, "fp32", 1, 20, rank, rope)
        q = random(rng, (1, PROMPT, 1, rank + rope))

        def op(q=q, latents=latents, ropes=ropes, rank=rank):
            return ops.sparse_mla_decode(q, latents, ropes, rank=rank, scale=0.1)

        with metal():
            y = op()
            mx.eval(y)
        assert GPU or len(metal_sim.take_launches()) == 2
        with cpu():
            assert_same_bits(y, op())
