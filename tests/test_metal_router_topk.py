"""The Metal shaders of router_topk in the simulator take two launches and equal, bit for bit, the
CPU and the reference."""

import functools
import itertools

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import DTYPES, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_backend import Batches, cpu, metal

from glm_fused import ops
from glm_fused.ops import metal_sim


def route(args, top_k, n_group=1, topk_group=1, norm=True, factor=2.5, **how):
    found = ops.router_topk(
        *args, top_k=top_k, n_group=n_group, topk_group=topk_group,
        norm_topk_prob=norm, routed_scaling_factor=factor, **how,
    )  # fmt: skip
    mx.eval(found)
    return found


def check(args, top_k, tiles=(4, 2, 8, 2), host=None, **routing):
    """Compare the shaders with the CPU and the reference; returns the launches."""
    with metal(tiles=tiles, **(host or {})):
        found = route(args, top_k, **routing)
    with cpu():
        expected = [route(args, top_k, reference=r, **routing) for r in (False, True)]
    for chosen, shares in expected:
        np.testing.assert_array_equal(np.array(found[0]), np.array(chosen))
        assert_same_bits(found[1], shares)
    launches = metal_sim.take_launches()
    assert [launch.kernel.split("_")[3] for launch in launches] == ["logits", "select"]
    assert all(launch.report.clean for launch in launches), launches
    return launches


def inputs(rng, dtypes, tokens, experts, hidden, ties=False):
    def values(*shape):
        draw = rng.integers(-2, 3, shape) if ties else rng.standard_normal(shape)
        return mx.array(draw.astype(np.float32))

    x, weight = values(tokens, hidden), values(experts, hidden)
    return x.astype(DTYPES[dtypes[0]]), weight.astype(DTYPES[dtypes[1]]), values(experts)


@pytest.mark.parametrize("contract", [False, True], ids=["separate", "contracted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_cpu(dtype, contract):
    # Without contraction a dot rounds differently; integers are exact either way.
    rng = np.random.default_rng(3)
    host = {"contract": contract, "trace": contract}
    for tokens, hidden, top_k in ((1, 130, 8), (3, 256, 1), (2, 5, 37)):
        args = inputs(rng, (dtype, dtype), tokens, 37, hidden, ties=not contract)
        check(args, top_k, host=host)


KINDS = list(itertools.product(DTYPES, DTYPES))
COUNTS = [(1, 1), (2, 1), (37, 1), (16, 4), (300, 3), (1024, 1)]  # experts, groups


@functools.cache
def libraries():
    """Every kernel of the cases below: types, vectors at once, whole fours or not, and counts."""

    def run(case):
        dtypes, tokens, hidden, (experts, groups) = case
        args = inputs(np.random.default_rng(0), dtypes, tokens, experts, hidden)
        return ops.router_topk(*args, top_k=1, n_group=groups)

    kernels = itertools.product(KINDS, (1, 2, 4, 8), (3, 4), COUNTS[:1])
    return Batches(run, [*kernels, *((KINDS[0], 1, 3, c) for c in COUNTS)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_equals_cpu_and_reference(data):
    dtypes = data.draw(st.sampled_from(KINDS))
    experts, groups = data.draw(st.sampled_from(COUNTS))
    tokens = data.draw(st.integers(1, 17))
    # Half of them are whole fours; 1024 or 2048 values are what a lane asks for at once.
    hidden = data.draw(st.integers(1, 4200) | st.integers(1, 1050).map(lambda n: 4 * n))
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, min(experts // groups * kept, 20)))
    args = inputs(
        np.random.default_rng(data.draw(st.integers(0, 99))),
        dtypes, tokens, experts, min(hidden, 600000 // experts), data.draw(st.booleans()),
    )  # fmt: skip
    compiler = libraries().compiler(contract=True, trace=False)
    simdgroups = data.draw(st.sampled_from([1, 2, 5]))
    check(
        args, top_k, (4, 2, 8, simdgroups), {"compiler": compiler}, n_group=groups,
        topk_group=kept, norm=data.draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("ties", [False, True])
def test_groups(ties):
    rng = np.random.default_rng(4)
    for topk_group, norm in ((1, True), (2, False), (4, True)):
        args = inputs(rng, ("bfloat16", "bfloat16"), 3, 32, 64, ties)
        check(args, 6, host={"trace": True}, n_group=4, topk_group=topk_group, norm=norm)


def test_nan_loses_and_the_lowest_index_wins():
    x = mx.ones((1, 4))
    bias = mx.array(np.where(np.arange(32) % 3 == 0, np.nan, 1.0).astype(np.float32))
    check((x, mx.zeros((32, 4)), bias), 8, n_group=4, topk_group=2)
    none = mx.full((32,), float("nan"))
    check((x, mx.zeros((32, 4)), none), 3, n_group=4, topk_group=2)


@pytest.mark.parametrize("which", [0, 1], ids=["x", "weight"])
@pytest.mark.parametrize("begin, fours", [(1, False), (2, False), (4, True)])
def test_fours_are_read_at_once_where_they_may_be(begin, fours, which):
    """A row of 64 values lies on fours only if the first does."""
    args = list(inputs(np.random.default_rng(6), ("float32", "float32"), 3, 16, 64))
    rows = args[which]
    args[which] = mx.concatenate([mx.zeros(begin), rows.flatten()])[begin:].reshape(rows.shape)
    logits, _ = check(args, 3)
    assert ("true" in logits.kernel) == fours


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_glm_sizes(tokens):
    rng = np.random.default_rng(5)
    logits, select = check(inputs(rng, ("bfloat16", "bfloat16"), tokens, 256, 6144), 8, tiles=None)
    assert logits.groups == (128, (tokens + 7) // 8, 1) and logits.threadgroup == (32, 2, 1)
    assert select.groups == (tokens, 1, 1) and select.threadgroup == (32, 8, 1)


def test_a_row_is_read_once_for_eight_tokens():
    rng = np.random.default_rng(7)
    for tokens, times in ((1, 1), (8, 1), (9, 2)):
        args = inputs(rng, ("bfloat16", "float32"), tokens, 6, 1100)
        logits, select = check(args, 2, host={"trace": True})
        weight = logits.report.traffic[1]
        assert weight.unique_read == args[1].nbytes and weight.read == times * args[1].nbytes
        assert logits.report.traffic[2].unique_written == tokens * 6 * 4
        assert select.report.traffic[0].read == tokens * 6 * 4


def test_no_tokens_launch_nothing():
    with metal():
        chosen, shares = route((mx.zeros((0, 8)), mx.zeros((16, 8)), mx.zeros(16)), 2)
    assert chosen.shape == shares.shape == (0, 2)
    assert metal_sim.take_launches() == []
