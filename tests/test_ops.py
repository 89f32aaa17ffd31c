"""The fused kernels equal the unfused reference bit for bit, and are close to float64."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import (
    AFFINE,
    DTYPES,
    FORMATS,
    GGUFS,
    OURS,
    assert_same_bits,
    dequantized,
    format_id,
    poison,
    random_weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_fused import ops

EACH = [*FORMATS, *OURS, *GGUFS]

pytestmark = pytest.mark.usefixtures("device", "several_threads")
# A GPU runs stock MLX for matrices and prompts, which does not promise what these tests check.
cpu_only = pytest.mark.parametrize("device", ["cpu"], indirect=True)
each_format = pytest.mark.parametrize("fmt", EACH, ids=format_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(rng.standard_normal(shape, dtype=np.float32)).astype(dtype)


def column_unit(fmt: tuple[str, int, int]) -> int:
    """Columns come in whole groups; dense weights take any number."""
    return fmt[2] or 1


def whole_groups(fmt: tuple[str, int, int], columns: int) -> int:
    return -(-columns // column_unit(fmt)) * column_unit(fmt)


# These tolerances are against float64 arithmetic on the same dequantized weights; they allow fp32
# accumulation, then one rounding to the activations' dtype.
ROUNDING = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@each_dtype
@each_format
@pytest.mark.parametrize(("n", "k"), [(40, 1024), (13, 384)], ids=["fast", "general"])
def test_matvec_is_close_to_float64(fmt, dtype, n, k):
    k = whole_groups(fmt, k)
    rng = np.random.default_rng(n * k + len(fmt[0]))
    w = random_weight(rng, (n, k), fmt)
    x = random_array(rng, (3, k), dtype)
    y = np.array(ops.quantized_matvec(x, w).astype(mx.float32), dtype=np.float64)
    expected = np.array(x.astype(mx.float32), dtype=np.float64) @ dequantized(w).T
    assert np.abs(y - expected).max() <= ROUNDING[dtype] * np.abs(expected).max()


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_matvec_equals_the_reference(data):
    fmt = data.draw(st.sampled_from(EACH))
    dtype = data.draw(st.sampled_from(list(DTYPES.values())))
    scales = data.draw(st.sampled_from(list(DTYPES.values())))
    unit = column_unit(fmt)
    fast = data.draw(st.booleans())
    n = data.draw(st.integers(1, 5)) * 8 if fast else data.draw(st.integers(1, 45))
    k = (
        512 * data.draw(st.integers(1, 3))
        if fast
        else unit * data.draw(st.integers(1, 700 // unit))
    )
    rows = data.draw(st.sampled_from([1, 2, 3, 5, 16, 17]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    w = random_weight(rng, (n, k), fmt, scales)
    x = random_array(rng, (rows, k), dtype)
    fused = ops.quantized_matvec(x, w, reference=False)
    mx.eval(fused)
    assert_same_bits(fused, ops.quantized_matvec(x, w, reference=True))


@pytest.mark.parametrize("n", [16, 48, 272, 37])
@pytest.mark.parametrize("fill", ["random", "negative zeros", "one infinity"])
@pytest.mark.parametrize("fmt", [fmt for fmt in AFFINE if fmt[2] == 32], ids=format_id)
def test_matvec_of_rows_that_fill_half_of_the_lanes(fmt, fill, n):
    """On AVX-512 two such rows are met as one; nothing of one may come to the other."""
    rng = np.random.default_rng(n)
    lane = {2: 16, 6: 4, 8: 4}.get(fmt[1], 8)  # values
    w = random_weight(rng, (n, 8 * lane), fmt, mx.bfloat16)
    x = random_array(rng, (1, 8 * lane), mx.float32)
    if fill == "negative zeros":
        x = mx.full(x.shape, -0.0)
    elif fill == "one infinity":
        w.planes[1][n // 2] = mx.inf
    fused = ops.quantized_matvec(x, w, reference=False)
    mx.eval(fused)
    assert_same_bits(fused, ops.quantized_matvec(x, w, reference=True))
    if fill == "one infinity":
        assert mx.isfinite(fused).sum().item() == n - 1


@cpu_only
@each_format
@pytest.mark.parametrize("fill", ["zeros", "subnormals", "an infinity"])
@pytest.mark.parametrize(("n", "k"), [(16, 1024), (11, 384)], ids=["fast", "general"])
def test_matvec_of_values_at_the_ends_of_the_range(fmt, fill, n, k):
    k = whole_groups(fmt, k)
    rng = np.random.default_rng([n, len(fill)])
    x = rng.choice([-1.0, 1.0], (1, k)).astype(np.float32)
    if fill == "an infinity":
        x[0, k // 3] = np.inf
    else:
        x *= 0.0 if fill == "zeros" else 2.0**-140
    w = random_weight(rng, (n, k), fmt)
    fused, reference = (
        np.array(ops.quantized_matvec(mx.array(x), w, reference=which)) for which in (False, True)
    )
    nan = np.isnan(reference)
    assert np.array_equal(np.isnan(fused), nan)
    assert np.array_equal(fused[~nan].view(np.uint32), reference[~nan].view(np.uint32))


@cpu_only
@pytest.mark.parametrize("vectors", [1, 3, 21])
@pytest.mark.parametrize(("n", "k"), [(40, 1024), (13, 384)], ids=["fast", "general"])
@pytest.mark.parametrize("plane", [("mxfp8", 8, 32, 0), ("nvfp4", 4, 16, 1)], ids=lambda p: p[0])
def test_every_e4m3_code_is_that_of_the_reference(plane, n, k, vectors):
    """Codes of the weight (mxfp8) or the scales (nvfp4); every third row has a NaN in one place."""
    *fmt, which = plane
    rng = np.random.default_rng([n, vectors, which])
    w = random_weight(rng, (n, k), tuple(fmt))
    shape = w.planes[which].view(mx.uint8).shape
    codes = rng.integers(0, 256, shape, np.uint8)
    codes[codes & 127 == 127] = 0
    rows = np.arange(0, n, 3)
    codes[rows, rng.integers(0, shape[1], rows.size)] = rng.choice([127, 255], rows.size)
    planes = list(w.planes)
    planes[which] = mx.array(codes).view(planes[which].dtype)
    w = w._replace(planes=tuple(planes))
    x = random_array(rng, (vectors, k), mx.float32)
    fused, reference = (
        np.array(ops.quantized_matvec(x, w, reference=which)) for which in (False, True)
    )
    assert np.isnan(fused[:, rows]).all() and np.isnan(reference[:, rows]).all()
    others = np.setdiff1d(np.arange(n), rows)
    assert not np.isnan(reference[:, others]).any()
    assert np.array_equal(fused[:, others].view(np.uint32), reference[:, others].view(np.uint32))


@cpu_only
@each_format
def test_matvec_rows_do_not_depend_on_their_number(fmt):
    rng = np.random.default_rng(5)
    columns = whole_groups(fmt, 640)
    w = random_weight(rng, (24, columns), fmt)
    x = random_array(rng, (70, columns), mx.bfloat16)
    together = ops.quantized_matvec(x, w)
    alone = mx.concatenate([ops.quantized_matvec(x[i : i + 1], w) for i in range(70)])
    assert_same_bits(together, alone)


@cpu_only
def test_matvec_with_a_matrix_per_head():
    rng = np.random.default_rng(6)
    w = random_weight(rng, (3, 20, 96), ("affine", 4, 32))
    x = random_array(rng, (2, 3, 5, 96), mx.float32)
    y = ops.quantized_matvec(x, w)
    assert y.shape == (2, 3, 5, 20)
    for b in range(2):
        for h in range(3):
            head = w._replace(planes=[plane[h] for plane in w.planes])
            assert_same_bits(y[b, h], ops.quantized_matvec(x[b, h], head))
    assert_same_bits(y, ops.quantized_matvec(x, w, reference=True))


def moe_inputs(rng, tokens, top_k, bank, hidden, intermediate, formats, dtype, scales=mx.bfloat16):
    gate = random_weight(rng, (bank, intermediate, hidden), formats[0], scales)
    up = random_weight(rng, (bank, intermediate, hidden), formats[1], scales)
    down = random_weight(rng, (bank, hidden, intermediate), formats[2], scales)
    slots = rng.integers(0, bank, (tokens, top_k)).astype(np.int32)
    unused = sorted(set(range(bank)) - set(slots.ravel().tolist()))
    weights = [poison(w, unused) for w in (gate, up, down)]
    scores = mx.array(rng.uniform(0, 1, (tokens, top_k)).astype(np.float32))
    return random_array(rng, (tokens, hidden), dtype), *weights, mx.array(slots), scores


def scales_for(device: str, dtype: mx.Dtype, wanted: mx.Dtype) -> mx.Dtype:
    """The scales' dtype: stock MLX, the GPU's reference, promotes x to it where they differ."""
    return dtype if device == "gpu" else wanted


@each_dtype
@each_format
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_moe_equals_the_reference(fmt, dtype, tokens, device):
    rng = np.random.default_rng([tokens, EACH.index(fmt)])
    # 512 columns and whole tiles take MLX's fast order, the others its general one.
    hidden, intermediate = (512, 136) if tokens % 2 else (384, 72)
    hidden, intermediate = whole_groups(fmt, hidden), whole_groups(fmt, intermediate)
    scales = scales_for(device, dtype, mx.bfloat16)
    args = moe_inputs(rng, tokens, 3, 6, hidden, intermediate, [fmt] * 3, dtype, scales)
    fused = ops.moe_decode(*args, reference=False)
    mx.eval(fused)
    assert not mx.isnan(fused).any().item()
    assert_same_bits(fused, ops.moe_decode(*args, reference=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_moe_equals_the_reference_anywhere(device, data):
    formats = [data.draw(st.sampled_from(EACH)) for _ in range(3)]
    dtype = data.draw(st.sampled_from(list(DTYPES.values())))
    scales = scales_for(device, dtype, data.draw(st.sampled_from(list(DTYPES.values()))))
    unit_in = max(column_unit(formats[0]), column_unit(formats[1]))
    unit_mid = column_unit(formats[2])
    hidden = data.draw(st.sampled_from([512, *(unit_in * i for i in range(1, 400 // unit_in))]))
    intermediate = unit_mid * data.draw(st.integers(1, max(1, 200 // unit_mid)))
    tokens = data.draw(st.sampled_from([1, 2, 5, 16, 33]))
    top_k = data.draw(st.integers(1, 4))
    bank = data.draw(st.integers(1, 7))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    args = moe_inputs(rng, tokens, top_k, bank, hidden, intermediate, formats, dtype, scales)
    fused = ops.moe_decode(*args, reference=False)
    mx.eval(fused)
    assert not mx.isnan(fused).any().item()
    assert_same_bits(fused, ops.moe_decode(*args, reference=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_moe_is_close_to_float64(dtype):
    rng = np.random.default_rng(8)
    x, gate, up, down, slots, scores = moe_inputs(
        rng, 2, 4, 6, 512, 256, [("affine", 4, 64)] * 3, dtype
    )
    y = np.array(ops.moe_decode(x, gate, up, down, slots, scores).astype(mx.float32))
    g, u, d = (dequantized(w) for w in (gate, up, down))
    expected = np.zeros(y.shape)
    for t, row in enumerate(np.array(x.astype(mx.float32), dtype=np.float64)):
        for e, score in zip(np.array(slots)[t], np.array(scores)[t], strict=True):
            h = g[e] @ row
            expected[t] += score * (d[e] @ (h / (1 + np.exp(-h)) * (u[e] @ row)))
    assert np.abs(y - expected).max() <= 3 * ROUNDING[dtype] * np.abs(expected).max()


@cpu_only
@each_dtype
@each_format
@pytest.mark.parametrize("tokens", [1, 5, 600])
def test_moe_is_its_projections_one_by_one(fmt, dtype, tokens):
    """600 tokens are taken in two chunks."""
    rng = np.random.default_rng([tokens, EACH.index(fmt)])
    hidden, intermediate = (whole_groups(fmt, n) for n in ((64, 32) if tokens > 5 else (512, 72)))
    args = moe_inputs(rng, tokens, 3, 6, hidden, intermediate, [fmt] * 3, dtype)
    x, gate, up, down, slots, scores = args

    def chain(**how):
        gates, ups = (ops.expert_matvec(x, weight, slots, **how) for weight in (gate, up))
        y = ops.expert_matvec(ops.swiglu(gates, ups), down, slots, **how)
        return ops.expert_sum(y, scores)

    one_by_one = chain(reference=False)
    mx.eval(one_by_one)
    assert not mx.isnan(one_by_one).any().item()
    assert_same_bits(one_by_one, ops.moe_decode(*args))
    if tokens <= 5:
        assert_same_bits(one_by_one, chain(reference=True))


@cpu_only
@each_format
def test_rows_of_experts_do_not_depend_on_the_others(fmt):
    rng = np.random.default_rng(EACH.index(fmt))
    w = random_weight(rng, (4, 256, whole_groups(fmt, 512)), fmt)
    x = random_array(rng, (3, 2, whole_groups(fmt, 512)), mx.bfloat16)
    slots = mx.array([[1, 3], [0, 1], [1, 1]], dtype=mx.uint32)
    planes = [
        plane if spec.per_matrix else plane[:, 128 // spec.rows :]
        for spec, plane in zip(w.format.planes, w.planes, strict=True)
    ]
    assert_same_bits(
        ops.expert_matvec(x, w._replace(planes=planes), slots),
        ops.expert_matvec(x, w, slots)[..., 128:],
    )


@cpu_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": mx.zeros((3,), mx.int32)}, r"slots must be \[tokens, top_k\]"),
        ({"slots": mx.zeros((3, 0), mx.int32)}, r"slots must be \[tokens, top_k\]"),
        ({"slots": mx.zeros((3, 2))}, "slots must be int32 or uint32 but is float32"),
        ({"slots": mx.array([[0, 1], [1, 0], [0, 2]])}, r"slots\[2, 1\] must be in \[0, 2\)"),
        ({"x": mx.zeros((2, 64))}, r"x must be \[3, k\] or \[3, 2, k\] but has shape \(2,64\)"),
        ({"x": mx.zeros((3, 1, 64))}, r"x must be \[3, k\] or \[3, 2, k\]"),
        ({"x": mx.zeros((3, 32))}, r"\[expert_matvec\] w"),
        ({"w": ops.Weight.dense(mx.zeros((8, 64)))}, r"\[expert_matvec\] w"),
        ({"w": ops.Weight.dense(mx.zeros((0, 8, 64)))}, "at least one slot"),
    ],
)
def test_expert_matvec_refuses(change, message):
    args = {
        "x": mx.zeros((3, 64)),
        "w": ops.Weight.dense(mx.zeros((2, 8, 64))),
        "slots": mx.zeros((3, 2), mx.int32),
    }
    with pytest.raises(ValueError, match=message):
        ops.expert_matvec(**args | change)


@cpu_only
def test_expert_matvec_refuses_slots_that_are_computed_later():
    w, slots = ops.Weight.dense(mx.zeros((2, 8, 64))), mx.array([[0], [1]]) + 1
    y = ops.expert_matvec(mx.zeros((2, 64)), w, slots)
    with pytest.raises(ValueError, match=r"\[expert_matvec\] slots\[1, 0\] must be in \[0, 2\)"):
        mx.eval(y)


@cpu_only
def test_moe_tokens_do_not_depend_on_each_other():
    rng = np.random.default_rng(9)
    x, *weights, slots, scores = moe_inputs(
        rng, 40, 2, 5, 256, 64, [("mxfp4", 4, 32)] * 3, mx.bfloat16
    )
    together = ops.moe_decode(x, *weights, slots, scores)
    alone = [
        ops.moe_decode(x[i : i + 1], *weights, slots[i : i + 1], scores[i : i + 1])
        for i in range(40)
    ]
    assert_same_bits(together, mx.concatenate(alone))


@cpu_only
@pytest.mark.parametrize("slot", [-1, 6, 2**31 - 1])
def test_moe_refuses_a_slot_outside_the_bank(slot):
    rng = np.random.default_rng(10)
    x, *weights, slots, scores = moe_inputs(
        rng, 1, 2, 6, 64, 32, [("affine", 8, 32)] * 3, mx.float32
    )
    slots = mx.array([[0, slot]], dtype=mx.int32)
    with pytest.raises(ValueError, match=r"slots\[0, 1\] must be in \[0, 6\)"):
        ops.moe_decode(x, *weights, slots, scores)


def route_in_numpy(logits, bias, top_k, n_group, topk_group):
    """Experts by descending biased score, the lowest index first among equals."""
    biased = 1 / (1 + np.exp(-logits.astype(np.float64))) + bias
    groups = biased.reshape(n_group, -1)
    worth = np.sort(groups, axis=1)[:, -2:].sum(axis=1) if n_group > 1 else np.zeros(1)
    kept = np.argsort(-worth, kind="stable")[:topk_group]
    masked = np.full_like(groups, -np.inf)
    masked[kept] = groups[kept]
    return np.argsort(-masked.ravel(), kind="stable")[:top_k]


@pytest.mark.parametrize(
    ("experts", "top_k", "n_group", "topk_group"),
    [(16, 4, 1, 1), (10, 3, 1, 1), (256, 8, 8, 4), (1, 1, 1, 1)],
)
@each_dtype
def test_router(dtype, experts, top_k, n_group, topk_group):
    rng = np.random.default_rng(experts)
    x = random_array(rng, (7, 96), dtype)
    weight = random_array(rng, (experts, 96), mx.float32) * 0.1
    bias = mx.array(rng.normal(-1, 0.3, experts).astype(np.float32))
    options = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
    chosen, scores = ops.router_topk(x, weight, bias, routed_scaling_factor=2.5, **options)
    rows = np.array(x.astype(mx.float32), dtype=np.float64)
    logits = rows @ np.array(weight, dtype=np.float64).T
    for t in range(7):
        expected = route_in_numpy(logits[t], np.array(bias), top_k, n_group, topk_group)
        assert np.array(chosen[t]).tolist() == expected.tolist()
        weights = 1 / (1 + np.exp(-logits[t][expected]))
        np.testing.assert_allclose(scores[t], 2.5 * weights / weights.sum(), rtol=2e-6)
    again, again_scores = ops.router_topk(
        x, weight, bias, routed_scaling_factor=2.5, reference=True, **options
    )
    assert np.array_equal(np.array(chosen), np.array(again))
    assert_same_bits(scores, again_scores)


def test_router_takes_the_lowest_index_among_equals():
    weight, bias = mx.zeros((12, 32)), mx.zeros(12)
    chosen, _ = ops.router_topk(mx.ones((2, 32)), weight, bias, top_k=5)
    assert chosen.tolist() == [[0, 1, 2, 3, 4]] * 2
    bias[7] = 1.0
    chosen, _ = ops.router_topk(mx.ones((1, 32)), weight, bias, top_k=3)
    assert chosen.tolist() == [[7, 0, 1]]


BITS_OF_EVERY_FORMAT = """
import hashlib, mlx.core as mx, numpy as np
from formats_under_test import FORMATS, GGUFS, OURS, DTYPES, bits_of, random_weight
from glm_fused import _ext, ops
mx.set_default_device(mx.cpu)
digest = hashlib.sha256()
rng = np.random.default_rng(11)
for fmt in [*FORMATS, *OURS, *GGUFS]:
    for scales in DTYPES.values():
        for n, k in ((16, 1024), (11, 768 if fmt in GGUFS else 256 + 128)):
            w = random_weight(rng, (n, k), fmt, scales)
            x = mx.array(rng.standard_normal((7, k), dtype=np.float32))
            digest.update(bits_of(ops.quantized_matvec(x, w)).tobytes())
print(_ext.cpu_kernels(), digest.hexdigest())
"""


def run_with_kernels(name: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GLM_FUSED_KERNELS": name, "PYTHONPATH": os.path.dirname(__file__)}
    return subprocess.run(
        [sys.executable, "-c", BITS_OF_EVERY_FORMAT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@cpu_only
def test_every_instruction_set_gives_the_same_bits():
    best = run_with_kernels("")
    assert best.returncode == 0, best.stderr
    name, digest = best.stdout.split()
    for other in {"avx512": ["avx2", "portable"], "avx2": ["portable"]}.get(name, []):
        run = run_with_kernels(other)
        assert run.stdout.split() == [other, digest], run.stderr


@cpu_only
def test_an_unknown_instruction_set_is_refused():
    run = run_with_kernels("mmx")
    assert run.returncode != 0
    assert "GLM_FUSED_KERNELS=mmx cannot run here" in run.stderr
