"""The Metal shaders of moe_decode in the simulator equal, bit for bit, the chain of MLX's own
kernels and the CPU; they are clean under the tracer and read each weight once."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from expert_layers import (
    Case,
    assert_same,
    make_layer,
    make_layer_of_bits,
    run_cpu,
    run_fused,
    to_mlx,
)
from formats_under_test import FORMATS, format_id
from metal_backend import Batches
from mlx_kernels import Libraries, run_chain

DENSE = ("dense", 0, 0)
AFFINE4, MXFP4 = ("affine", 4, 64), ("mxfp4", 4, 32)
TYPES = ["float32", "float16", "bfloat16"]


def shapes(dtype, fmt, seed):
    """Cases of `fmt` in MLX's fast order, and in the general one with odd numbers of rows."""
    tokens = [1, 2, 3][seed % 3]
    return [
        Case(dtype, fmt, fmt, fmt, tokens=1, seed=seed),
        Case(dtype, fmt, fmt, DENSE, tokens, hidden=384, intermediate=45, rows=2, seed=seed),
        Case(dtype, DENSE, DENSE, fmt, tokens, hidden=77, intermediate=384, rows=2, seed=seed),
    ]


BY_FORMAT = [
    c
    for i, (fmt, dtype) in enumerate(zip(FORMATS, itertools.cycle(TYPES), strict=False))
    for c in shapes(dtype, fmt, i)
]
EVERY_FORMAT = [
    c
    for i, (fmt, dtype) in enumerate(itertools.product(FORMATS, TYPES))
    for c in shapes(dtype, fmt, i)
]
BY_TOKENS = [
    Case("bfloat16", AFFINE4, MXFP4, ("affine", 6, 64), tokens, 3, 512, 64, 5, seed=tokens)
    for tokens in (1, 2, 4, 7, 16)
]
EVERY_TOKENS = [
    Case("float16", fmt, fmt, AFFINE4, tokens, top_k, 512, 64, used, seed=tokens)
    for fmt in (AFFINE4, ("affine", 3, 32), MXFP4, DENSE)
    for tokens in range(1, 17)
    for top_k, used in ((2, 2), (3, 7))
]
SMALL = [
    Case("bfloat16", DENSE, DENSE, DENSE, 2, 1, hidden, intermediate, 2)
    for hidden, intermediate in ((1, 1), (3, 130), (127, 2), (129, 7))
]
TRACED = [
    Case("bfloat16", AFFINE4, AFFINE4, AFFINE4, 1, 2, 512, 64, 3),
    Case("bfloat16", AFFINE4, MXFP4, AFFINE4, 16, 2, 512, 64, 3),
    Case("bfloat16", ("affine", 3, 32), ("affine", 5, 32), DENSE, 3, 2, 96, 13, 2),
    Case("bfloat16", ("mxfp8", 8, 32), ("nvfp4", 4, 16), MXFP4, 4, 3, 544, 32, 4),
]


def traced_case(i, dtype):
    """A case of formats i, i + 1 and i + 2, where gate and up, or down, are in MLX's fast order."""
    gate, up, down = (FORMATS[(i + j) % len(FORMATS)] for j in range(3))
    k = max(f[2] for f in (gate, up, down))
    sizes = (512, max(k, 64)) if i % 2 else (max(k, 64), 512)
    return Case(dtype, gate, up, down, 1 + i % 2, 2, *sizes, 2, rows=2, seed=i % 3)


# These are every format with one type each, and with the other types.
TRACED_FORMATS = [traced_case(i, TYPES[i % 9 // 3]) for i in range(0, len(FORMATS), 3)]
TRACED_TYPES = [
    case
    for shift, dtype in enumerate(TYPES)
    for i in range(-shift, len(FORMATS), 3)
    if (case := traced_case(i, dtype)) not in TRACED_FORMATS
]
# These have GLM's sizes, and the kernels of the first of `shapes`.
GLM = [
    Case("bfloat16" if fmt == DENSE else c.dtype, fmt, fmt, fmt, 1, 8, 6144, 2048, 8)
    for fmt, c in zip(FORMATS, BY_FORMAT[::3], strict=True)
]
DEFAULT = [*BY_FORMAT, *BY_TOKENS, *SMALL]
# One shape of every third format's, in turn.
SEPARATE = [*(BY_FORMAT[i + i // 9 % 3] for i in range(0, len(BY_FORMAT), 9)), *BY_TOKENS, *SMALL]
SWEEP = [*EVERY_FORMAT, *EVERY_TOKENS]


def batches(cases):
    return Batches(lambda case: make_layer_of_bits(case).moe(), cases)


default, sweep = batches(DEFAULT), batches(SWEEP)
traced, traced_types = batches([*TRACED, *TRACED_FORMATS]), batches(TRACED_TYPES)
mlx_default, mlx_sweep = Libraries([*DEFAULT, *GLM]), Libraries(SWEEP)
separate, mlx_separate = batches(SEPARATE), Libraries(SEPARATE)


def case_id(c):
    names = "-".join(format_id(f) for f in (c.gate, c.up, c.down))
    return f"{names}-{c.dtype}-{c.tokens}x{c.top_k}-{c.hidden}x{c.intermediate}"


def check(ours, mlx, case, contract):
    mlx.prepare(case, contract)
    layer = make_layer(case)
    y = run_fused(layer, compiler=ours.compiler(contract=contract, trace=False))
    assert_same(y, run_chain(mlx, layer, contract))
    if contract:
        assert_same(y, run_cpu(layer))


@pytest.mark.parametrize("case", DEFAULT, ids=case_id)
def test_equals_mlx_chain_and_cpu(case):
    check(default, mlx_default, case, contract=True)


@pytest.mark.parametrize("case", SEPARATE, ids=case_id)
def test_equals_mlx_chain_without_contraction(case):
    """Where a multiplication and an addition round separately; the sweep has every shape."""
    check(separate, mlx_separate, case, contract=False)


@pytest.mark.slow
@pytest.mark.parametrize("contract", [False, True], ids=["separate", "contracted"])
@pytest.mark.parametrize("case", SWEEP, ids=case_id)
def test_equals_mlx_chain_sweep(case, contract):
    check(sweep, mlx_sweep, case, contract)


def run_in_place(case):
    layer = make_layer_of_bits(case)
    compiler = default.compiler(contract=True, trace=False)
    return layer, run_fused(layer, compiler=compiler, in_place=True)


@pytest.mark.parametrize("case", GLM, ids=case_id)
def test_glm_sizes_equal_cpu(case):
    layer, y = run_in_place(case)
    assert np.isfinite(np.array(to_mlx(y, case.dtype).astype(mx.float32))).all()
    assert_same(y, run_cpu(layer))


@pytest.mark.slow
@pytest.mark.parametrize("case", GLM, ids=case_id)
def test_glm_sizes_equal_mlx_chain(case):
    layer, y = run_in_place(case)
    assert_same(y, run_chain(mlx_default, layer, True))


def run_traced(layer, libraries=traced):
    return run_fused(layer, compiler=libraries.compiler(contract=True, trace=True))


def read_once(report, *weights):
    for index in weights:
        traffic = report.traffic[index]
        assert traffic.read <= 1.05 * traffic.unique_read, f"buffer {index}: {traffic}"


@pytest.mark.parametrize("case", [*TRACED, *TRACED_FORMATS], ids=case_id)
def test_clean_and_reads_weights_once(case):
    check_reads(case, traced)


@pytest.mark.slow
@pytest.mark.parametrize("case", TRACED_TYPES, ids=case_id)
def test_every_type_is_clean_and_reads_weights_once(case):
    check_reads(case, traced_types)


def check_reads(case, libraries):
    layer = make_layer(case)
    y = run_traced(layer, libraries)
    assert_same(y, run_cpu(layer))
    gate_up, down_sum = layer.reports
    for report in layer.reports:
        assert report.clean, report
    read_once(gate_up, 2, 5)
    read_once(down_sum, 2)
    distinct, bank = len(np.unique(layer.slots)), layer.gate.planes[0].shape[0]
    assert gate_up.traffic[2].unique_read == layer.gate.planes[0].nbytes * distinct // bank
    assert down_sum.traffic[2].unique_read == layer.down.planes[0].nbytes * distinct // bank


def test_tokens_that_share_one_expert_read_it_once():
    case = TRACED[1]
    layer = make_layer(case, slots=np.full((case.tokens, case.top_k), 2, np.int32))
    run_traced(layer)
    pairs = case.tokens * case.top_k
    for report, weights in zip(layer.reports, ([2, 5], [2]), strict=True):
        for index in weights:  # a slot's pairs are taken 16 at a time
            assert report.traffic[index].read == pairs // 16 * report.traffic[index].unique_read


def test_slots_that_repeat_within_a_token():
    case = TRACED[3]
    layer = make_layer(case, slots=np.tile(np.array([[2, 1, 2]], np.int32), (case.tokens, 1)))
    y = run_traced(layer)
    assert_same(y, run_cpu(layer))


@pytest.mark.parametrize("slot", [-1, 5])
def test_slot_out_of_range_gives_nan_and_reads_nothing(slot):
    case = TRACED[0]
    layer = make_layer(case, slots=np.array([[1, slot]], np.int32))
    y = run_traced(layer)
    assert all(report.clean for report in layer.reports)
    assert np.all((y & 0x7FFF) > 0x7F80)
