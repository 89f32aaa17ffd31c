"""The Metal shader of router_topk in the simulator takes one launch and equals the CPU's bits."""

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import DTYPES, assert_same_bits
from metal_backend import cpu, metal

from glm_fused import ops
from glm_fused.ops import metal_sim


def check(x, weight, bias, top_k, n_group=1, topk_group=1, norm=True, factor=2.5, **settings):
    """Compare the shader with the CPU; returns the launch's report."""

    def route():
        found = ops.router_topk(
            x, weight, bias, top_k=top_k, n_group=n_group, topk_group=topk_group,
            norm_topk_prob=norm, routed_scaling_factor=factor,
        )  # fmt: skip
        mx.eval(found)
        return found

    with metal(tiles=(4, 2, 8, 4), **settings):
        chosen, shares = route()
    with cpu():
        expected = route()
    np.testing.assert_array_equal(np.array(chosen), np.array(expected[0]))
    assert_same_bits(shares, expected[1])
    (launch,) = metal_sim.take_launches()
    assert launch.groups == (x.shape[0], 1, 1)
    return launch.report


def inputs(rng, dtype, tokens, experts, hidden, ties=False):
    def values(*shape):
        draw = rng.integers(-2, 3, shape) if ties else rng.standard_normal(shape)
        return mx.array(draw.astype(np.float32))

    x, weight = values(tokens, hidden), values(experts, hidden)
    return x.astype(DTYPES[dtype]), weight.astype(DTYPES[dtype]), values(experts)


@pytest.mark.parametrize("contract", [False, True], ids=["separate", "contracted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_cpu(dtype, contract):
    # Without contraction a dot rounds differently; integers are exact either way.
    rng = np.random.default_rng(3)
    for tokens, hidden, top_k in ((1, 130, 8), (3, 256, 1), (2, 5, 37)):
        arguments = inputs(rng, dtype, tokens, 37, hidden, ties=not contract)
        report = check(*arguments, top_k, contract=contract, trace=contract)
        assert report.clean, report


@pytest.mark.parametrize("ties", [False, True])
def test_groups(ties):
    rng = np.random.default_rng(4)
    for topk_group, norm in ((1, True), (2, False), (4, True)):
        args = inputs(rng, "bfloat16", 3, 32, 64, ties)
        report = check(*args, 6, n_group=4, topk_group=topk_group, norm=norm, trace=True)
        assert report.clean, report


def test_nan_loses_and_the_lowest_index_wins():
    x = mx.ones((1, 4))
    bias = mx.array(np.where(np.arange(32) % 3 == 0, np.nan, 1.0).astype(np.float32))
    check(x, mx.zeros((32, 4)), bias, 8, n_group=4, topk_group=2)
    check(x, mx.zeros((32, 4)), mx.full((32,), float("nan")), 3, n_group=4, topk_group=2)


def test_glm_sizes():
    rng = np.random.default_rng(5)
    check(*inputs(rng, "bfloat16", 2, 256, 6144), 8)
