"""A prompt's experts on Metal: every weight is read once for a slot's tokens, and the error against
float64 is the decode kernels'."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from expert_layers import (
    Case,
    assert_same,
    make_layer,
    run_cpu,
    to_mlx,
    to_numpy,
)
from formats_under_test import FORMATS, GGUFS, OURS, dequantized, format_id
from metal_backend import GPU, Batches, metal, simulated_only

from glm_fused import ops
from glm_fused.ops import metal_sim

DENSE, AFFINE4, MXFP4 = ("dense", 0, 0), ("affine", 4, 64), ("mxfp4", 4, 32)
KERNELS = ["group_pairs", "grouped_gate_up", "grouped_down", "expert_sum"]
SHARED = Case("bfloat16", AFFINE4, AFFINE4, AFFINE4, 70, 3, 512, 64, 4)  # 52 pairs a slot
ODD = Case("bfloat16", DENSE, DENSE, ("affine", 3, 32), 19, 3, 77, 160, 5)


def of_format(fmt, dtype, seed):
    """Cases of MLX's fast order and of the general one."""
    sizes = [(17, 512, 128), (33, 384, 128)]
    return [Case(dtype, fmt, fmt, fmt, n, 2, *size, seed=seed) for n, *size in sizes]


CASES = [
    SHARED,
    ODD,
    Case("float16", MXFP4, AFFINE4, MXFP4, 18, 2, 64, 32),
    Case("float32", DENSE, DENSE, DENSE, 17, 1, 1, 1, 1),
    *(
        case
        for i, (fmt, dtype) in enumerate(
            zip([*FORMATS, *OURS], itertools.cycle(["float32", "float16", "bfloat16"]))
        )
        for case in of_format(fmt, dtype, i)
    ),
]
CASES += [Case("bfloat16", *GGUFS[i::6], 17, 2, 512, 256, seed=i) for i in range(6)]
traced = Batches(lambda case: make_layer(case).moe(), CASES)


def case_id(c):
    names = "-".join(format_id(f) for f in (c.gate, c.up, c.down))
    return f"{names}-{c.dtype}-{c.tokens}x{c.top_k}-{c.hidden}x{c.intermediate}"


def run(layer, **settings):
    """The bits of y, and the reports of the launches, which are those of a prompt."""
    with metal(**settings):
        y = layer.moe()
        mx.eval(y)
    launches = metal_sim.take_launches()
    if not GPU:
        names = [x.kernel.removeprefix("glm_fused_") for x in launches]
        assert all(a.startswith(b) for a, b in zip(names, KERNELS, strict=True)), names
    return to_numpy(y), [x.report for x in launches]


def values(y, dtype):
    return np.array(to_mlx(y, dtype).astype(mx.float32)).astype(np.float64)


def in_float64(layer):
    """The layer without any rounding."""
    gate, up, down = (dequantized(w) for w in (layer.gate, layer.up, layer.down))
    rows = np.array(layer.x.astype(mx.float32)).astype(np.float64)
    y = np.zeros(rows.shape)
    for token, choice in np.ndindex(layer.slots.shape):
        slot = layer.slots[token, choice]
        a, b = gate[slot] @ rows[token], up[slot] @ rows[token]
        y[token] += layer.scores[token, choice] * (down[slot] @ (a / (1 + np.exp(-a)) * b))
    return y


def error(y, truth):
    return np.sqrt(np.mean((y - truth) ** 2))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_error_is_the_decode_kernels(case):
    """In 16 bits it is that of rounding, which few values show by chance. In float32 sums are
    compensated, and it is smaller."""
    layer = make_layer(case)
    y, reports = run(layer, compiler=traced.compiler(contract=True, trace=True))
    assert all(report.clean for report in reports), reports
    truth = in_float64(layer)
    ours = error(values(y, case.dtype), truth)
    decode = error(values(run_cpu(layer), case.dtype), truth)
    assert ours <= decode * (1 if case.dtype == "float32" else 1.01)


@pytest.mark.parametrize("contract", [True, False])
def test_a_token_does_not_depend_on_company_or_on_time(contract):
    """The same bits whichever tokens are beside it, and each time."""
    layer = make_layer(SHARED)
    y, _ = run(layer, contract=contract)
    assert_same(y, run(layer, contract=contract)[0])
    some = np.array([5, 69, 0, *range(20, 40)])
    few = replace(
        layer, x=layer.x[mx.array(some)], slots=layer.slots[some], scores=layer.scores[some]
    )
    assert_same(y[some], run(few, contract=contract)[0])


@simulated_only
@pytest.mark.parametrize("skew", [0, 1])
def test_a_chunk_reads_every_expert_once(skew):
    """2,048 tokens that take 8 of 256 experts, at a reduced width. Where some experts are wanted
    four times as often as others, theirs are read again after 128 of their tokens."""
    rng = np.random.default_rng(3)
    layer = make_layer(
        Case("bfloat16", *[("affine", 4, 32)] * 3, 2048, 8, 64, 32, 256),
        slots=np.argsort(
            rng.gumbel(size=(2048, 256)) + skew * rng.normal(size=256), axis=1
        )[:, -8:].astype(np.int32),
        pad=False,
    )  # fmt: skip
    _, (sort, gate_up, down, total) = run(layer, trace=True)
    counts = np.bincount(layer.slots.reshape(-1), minlength=256)
    passes = np.ceil(counts / 128).sum() / (counts > 0).sum()
    for report, weights in ((gate_up, (2, 5)), (down, (2,))):
        for index in weights:
            traffic = report.traffic[index]
            assert traffic.unique_read == layer.gate.planes[0].nbytes * (counts > 0).mean()
            assert traffic.read == round(passes * traffic.unique_read)
            assert skew or traffic.read <= 1.1 * traffic.unique_read
    assert all(report.clean for report in (sort, gate_up, down, total))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_more_tokens_of_a_slot_than_are_taken_at_once(dtype):
    case = Case(dtype, AFFINE4, AFFINE4, AFFINE4, 300, 1, 64, 64, 2)
    slots = np.where(np.arange(300) < 290, 1, 2).astype(np.int32)[:, None]
    layer = make_layer(case, slots=slots)
    y, reports = run(layer, trace=True)
    assert all(report.clean for report in reports)
    truth = in_float64(layer)
    assert error(values(y, case.dtype), truth) <= 1.01 * error(
        values(run_cpu(layer), case.dtype), truth
    )


def test_an_infinite_sum_stays_one():
    """What rounding took of it is no number."""
    layer = make_layer(Case("float32", DENSE, DENSE, DENSE, 17, 1, 64, 32, 1))
    positive = (
        w._replace(planes=[mx.abs(plane) for plane in w.planes])
        for w in (layer.gate, layer.up, layer.down)
    )
    layer = replace(layer, **dict(zip(("gate", "up", "down"), positive, strict=True)))
    layer.x[3, 5] = float("inf")
    y, _ = run(layer)
    assert np.isposinf(y[3]).all() and np.isposinf(run_cpu(layer)[3]).all()
    assert np.isfinite(np.delete(y, 3, 0)).all()


@pytest.mark.parametrize("slot", [-1, 7])
def test_slot_out_of_range_gives_nan_to_its_token_alone(slot):
    layer = make_layer(ODD)
    y, _ = run(layer)
    bad = layer.slots.copy()
    bad[4, 1] = slot
    found, reports = run(replace(layer, slots=bad), trace=True)
    assert all(report.clean for report in reports)
    assert np.isnan(values(found[4], "bfloat16")).all()
    others = np.arange(len(y)) != 4
    assert_same(found[others], y[others])


def test_a_prompt_may_be_told_from_a_step():
    """Streamed experts say so of the pairs that they have, be they few or many."""
    layer = make_layer(replace(SHARED, tokens=3, top_k=1))
    arguments = layer.x, layer.gate, layer.up, layer.down
    rest = mx.array(layer.slots), mx.array(layer.scores)
    with metal():
        mx.eval(ops.moe_decode(*arguments, *rest, prompt=True))
        assert GPU or len(metal_sim.take_launches()) == len(KERNELS)
        mx.eval(ops.moe_decode(*arguments, *rest, prompt=False))
        assert GPU or len(metal_sim.take_launches()) == 2
