"""The Metal shader of router_topk in the simulator: one launch, equal to the CPU bit for bit."""

import mlx.core as mx
import numpy as np
import pytest
import sim
from formats_under_test import DTYPES
from metal_kernels import METAL_TYPES, host_name, instance, shader, to_numpy

from glm_fused import ops


def compiled(dtype, experts, groups, contract, trace=False):
    t = METAL_TYPES[dtype]
    function = f"router_topk<{t}, {t}, {experts}, {groups}>"
    text = shader("router_topk") + instance(function)
    lib = sim.compile(text, contract=contract, trace=trace)
    return lambda **arguments: lib.run(host_name(function), **arguments)


def check(kernel, x, weight, bias, top_k, n_group=1, topk_group=1, norm=True, factor=2.5):
    tokens, hidden = x.shape
    chosen = np.full((tokens, top_k), -1, np.int32)
    shares = np.full((tokens, top_k), np.nan, np.float32)
    head = np.array([hidden, top_k, topk_group, norm], np.int32).tobytes()
    params = np.frombuffer(head + np.float32(factor).tobytes(), np.uint8).copy()
    report = kernel(
        grid=(tokens, 1, 1),
        threadgroup=(32, 4, 1),
        buffers={
            0: to_numpy(x), 1: to_numpy(weight), 2: to_numpy(bias), 3: chosen, 4: shares, 5: params
        },
    )  # fmt: skip
    with mx.stream(mx.cpu):
        expected = ops.router_topk(
            x, weight, bias, top_k=top_k, n_group=n_group, topk_group=topk_group,
            norm_topk_prob=norm, routed_scaling_factor=factor,
        )  # fmt: skip
    np.testing.assert_array_equal(chosen, np.array(expected[0]))
    np.testing.assert_array_equal(shares.view(np.uint32), np.array(expected[1]).view(np.uint32))
    return report


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
    kernel = compiled(dtype, 37, 1, contract, trace=contract)
    for tokens, hidden, top_k in ((1, 130, 8), (3, 256, 1), (2, 5, 37)):
        report = check(kernel, *inputs(rng, dtype, tokens, 37, hidden, ties=not contract), top_k)
        assert report.clean, report


@pytest.mark.parametrize("ties", [False, True])
def test_groups(ties):
    rng = np.random.default_rng(4)
    kernel = compiled("bfloat16", 32, 4, True, trace=True)
    for topk_group, norm in ((1, True), (2, False), (4, True)):
        args = inputs(rng, "bfloat16", 3, 32, 64, ties)
        report = check(kernel, *args, 6, n_group=4, topk_group=topk_group, norm=norm)
        assert report.clean, report


def test_nan_loses_and_the_lowest_index_wins():
    kernel = compiled("float32", 32, 4, True)
    x = mx.ones((1, 4))
    bias = mx.array(np.where(np.arange(32) % 3 == 0, np.nan, 1.0).astype(np.float32))
    check(kernel, x, mx.zeros((32, 4)), bias, 8, n_group=4, topk_group=2)
    check(kernel, x, mx.zeros((32, 4)), mx.full((32,), float("nan")), 3, n_group=4, topk_group=2)


def test_glm_sizes():
    rng = np.random.default_rng(5)
    check(compiled("bfloat16", 256, 1, True), *inputs(rng, "bfloat16", 2, 256, 6144), 8)
