"""Blocks on Metal: the bits of the unfused chain on the CPU, in a few launches that are clean."""

import functools
import re

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_config, write_checkpoint
from formats_under_test import DTYPES, FORMATS, OURS, assert_same_bits, format_id
from long_context import random_rows
from metal_backend import GPU, cpu, metal, simulated_only
from test_blocks import (
    EPS,
    FOLDERS,
    HEADS,
    RANK,
    ROUTING,
    VALUES,
    Layer,
    attention_arguments,
    attention_chain,
    mlp_chain,
    normed,
    run,
)

from glm_fused import ops, reference_path
from glm_fused.loader import load_model
from glm_fused.ops import blocks, metal_sim

AFFINE4, MXFP4, DENSE = ("affine", 4, 64), ("mxfp4", 4, 32), ("dense", 0, 0)
FP8 = ("fp8", 8, 128)
HIDDEN = 256
# A format, a dtype, sequences and tokens of each.
FEW = [
    (AFFINE4, "bfloat16", 1, 1),
    (AFFINE4, "float16", 2, 3),
    (MXFP4, "bfloat16", 1, 16),
    (DENSE, "float32", 3, 5),
    (FP8, "bfloat16", 1, 2),
]
EACH = [
    (fmt, list(DTYPES)[i % 3], *[(1, 1), (1, 4), (2, 4)][i % 3])
    for i, fmt in enumerate([*FORMATS, *OURS])
]
CASES = [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in EACH)]


def case_id(value):
    return format_id(value) if isinstance(value, tuple) else str(value)


each_case = pytest.mark.parametrize("fmt, dtype, b, length", CASES, ids=case_id)


def each_case_with(names, values):
    """Each case with each of the values; by default each of the few with one of them, in turn."""
    few = [(*case, *values[i % len(values)]) for i, case in enumerate(FEW)]
    every = [(*case, *value) for case in [*FEW, *EACH] for value in values]
    more = [pytest.param(*one, marks=pytest.mark.slow) for one in every if one not in few]
    return pytest.mark.parametrize(f"fmt, dtype, b, length, {names}", [*few, *more], ids=case_id)


def launched(trace, make):
    """What `make` gives on Metal, after a look at its launches: their kernels."""
    with metal(trace=trace):
        found = make()
        mx.eval(found)
    launches = [] if GPU else metal_sim.take_launches()
    for launch in launches if trace else []:
        assert launch.report.clean, launch.report
    return found, [launch.kernel.removeprefix("glm_fused_").split("_")[0] for launch in launches]


def check(make, expected, *kernels):
    """`make` has these launches on Metal, and the bits of the chain's arrays."""
    found, seen = launched(not GPU, make)
    assert GPU or seen == list(kernels)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert_same_bits(a, mx.contiguous(b))


@each_case
def test_mlp_block(fmt, dtype, b, length):
    layer = Layer(1, fmt, DTYPES[dtype])
    x, norm, weights = layer.array(b, length, HIDDEN), layer.norm(HIDDEN), layer.mlp(HIDDEN, 128)
    expected = x + mlp_chain(normed(x, norm, True), weights, True)
    check(lambda: [blocks.mlp_block(x, norm, weights)], [expected], "project", "project")


@each_case_with("shared", [(AFFINE4,), (DENSE,), (None,)])
def test_moe_block(fmt, dtype, b, length, shared):
    layer = Layer(2, fmt, DTYPES[dtype])
    x, norm, router = layer.array(b, length, HIDDEN), layer.norm(HIDDEN), layer.array(7, HIDDEN)
    bias = mx.array(layer.rng.standard_normal(7, dtype=np.float32))
    experts = layer.mlp(HIDDEN, 128, 7)
    layer.fmt = shared
    others = None if shared is None else layer.mlp(HIDDEN, 320)
    h = normed(x, norm, True).reshape(-1, HIDDEN)
    slots, scores = ops.router_topk(h, router, bias, **ROUTING, reference=True)
    y = ops.moe_decode(h, *experts, slots, scores, reference=True)
    if others is not None:
        y = y + mlp_chain(h, others, True)
    check(
        lambda: [blocks.moe_block(x, norm, (router, bias), experts, others, **ROUTING)],
        [x + y.reshape(x.shape)],
        "project", "router", "moe", "moe",
    )  # fmt: skip


@each_case_with("full", [("shared",), ("full",), ("scoring",)])
def test_attention_project(fmt, dtype, b, length, full):
    layer = Layer(3, fmt, DTYPES[dtype])
    flags = full != "shared", full == "scoring", length % 2 == 0
    arguments = attention_arguments(layer, b, length, *flags)
    check(
        lambda: blocks.attention_project(*arguments),
        attention_chain(True, *arguments),
        "project", "project", "attention",
    )  # fmt: skip


@each_case
def test_attention_output(fmt, dtype, b, length):
    layer = Layer(4, fmt, DTYPES[dtype])
    x = layer.array(b, length, HIDDEN)
    attended = layer.array(b, length, HEADS, RANK).astype(mx.float32)
    unembed, o_proj = layer.weight(HEADS, VALUES, RANK), layer.weight(HIDDEN, HEADS * VALUES)
    heads = attended.swapaxes(1, 2).astype(x.dtype)
    values = ops.quantized_matvec(heads, unembed, reference=True)
    rows = values.swapaxes(1, 2).reshape(b, length, -1)
    check(
        lambda: [blocks.attention_output(x, attended, unembed, o_proj)],
        [x + ops.quantized_matvec(rows, o_proj, reference=True)],
        "project", "project",
    )  # fmt: skip


def attention(layer, b, length, total, kv_format, selects, rank=RANK, rope=16):
    """The arguments of attend, and the chain's result."""
    x = layer.array(b, length, HIDDEN)
    q = layer.array(b, length, HEADS, rank + rope)
    rows = random_rows(layer.rng, kv_format, b, total, rank, rope)
    selected = layer.rng.integers(-1, total, (b, length, 150)).astype(np.int32)
    selected = mx.array(selected) if selects else None
    start = mx.array([3] * b) if b > 1 else None
    unembed, o_proj = layer.weight(HEADS, VALUES, rank), layer.weight(HIDDEN, HEADS * VALUES)
    how = dict(rank=rank, scale=0.1, start=start)
    attended = ops.sparse_mla_decode(q, *rows, selected, **how, reference=True)
    heads = attended.swapaxes(1, 2).astype(x.dtype)
    values = ops.quantized_matvec(heads, unembed, reference=True).swapaxes(1, 2)
    values = values.reshape(b, length, -1)
    expected = x + ops.quantized_matvec(values, o_proj, reference=True)
    return functools.partial(
        blocks.attend, x, q, *rows, selected, unembed, o_proj, **how
    ), expected  # fmt: skip


@each_case_with("kv_format, selects", [("bf16", False), ("fp8", True)])
def test_attend(fmt, dtype, b, length, kv_format, selects):
    layer = Layer(11, fmt, DTYPES[dtype])
    made, expected = attention(layer, b, length, 130, kv_format, selects)
    check(lambda: [made()], [expected], "mla", "mla", "project")


def test_attend_without_keys_is_the_residual():
    layer = Layer(12, DENSE, mx.float32)
    made, _ = attention(layer, 1, 2, 20, "fp32", False)
    nothing = mx.full((1, 2, 9), -1, mx.int32)
    x, q, *rows = made.args[:4]
    found, _ = launched(
        False, lambda: blocks.attend(x, q, *rows, nothing, *made.args[5:], **made.keywords)
    )
    assert_same_bits(found, x)


def test_vectors_that_share_too_little_memory():
    """Of 16 tokens' vectors of 2048 values two fit, of 8192 values none do."""
    for rank, kernels in ((2048, 3), (8192, 4)):
        layer = Layer(13, DENSE, mx.float32)
        made, expected = attention(layer, 1, 16, 20, "fp32", False, rank, 0)
        found, seen = launched(False, made)
        assert GPU or len(seen) == kernels
        assert_same_bits(found, expected)


@pytest.mark.parametrize("widths", [(77, 5), (130, 129), (256, 8)])
def test_odd_sizes(widths):
    """Rows that fill no block of columns, and fewer of them than a threadgroup takes."""
    hidden, intermediate = widths
    layer = Layer(5, DENSE, mx.bfloat16)
    x, norm = layer.array(1, 3, hidden), layer.norm(hidden)
    weights = layer.mlp(hidden, intermediate)
    expected = x + mlp_chain(normed(x, norm, True), weights, True)
    check(lambda: [blocks.mlp_block(x, norm, weights)], [expected], "project", "project")


def test_inputs_of_any_strides():
    layer = Layer(6, AFFINE4, mx.bfloat16)
    norm, weights = layer.norm(HIDDEN), layer.mlp(HIDDEN, 128)
    x = layer.array(3, 2, 2 * HIDDEN)[..., ::2].swapaxes(0, 1)
    expected = x + mlp_chain(normed(x, norm, True), weights, True)
    check(lambda: [blocks.mlp_block(x, norm, weights)], [expected], "project", "project")


def test_norms_of_other_types_than_x():
    layer = Layer(7, AFFINE4, mx.bfloat16)
    x, weights = layer.array(1, 2, HIDDEN), layer.mlp(HIDDEN, 128)
    norm = layer.array(HIDDEN).astype(mx.float32), EPS
    expected = x + mlp_chain(normed(x, norm, True), weights, True)
    check(lambda: [blocks.mlp_block(x, norm, weights)], [expected], "project", "project")


@simulated_only
def test_tiles_change_no_bits():
    layer = Layer(8, AFFINE4, mx.bfloat16)
    arguments = attention_arguments(layer, 1, 3, True, True, True)
    expected = attention_chain(True, *arguments)
    for tiles in ((1, 1, 1, 1), (8, 4, 16, 2)):
        with metal(tiles=tiles):
            found = blocks.attention_project(*arguments)
            mx.eval(found)
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a, mx.contiguous(b))


NVFP4 = ("nvfp4", 4, 16)


@simulated_only
@pytest.mark.parametrize(
    "architecture, fmt, widths, rows",
    [
        ("applegpu_g17s", NVFP4, (512, 4096), (2, 4)),
        ("applegpu_g17s", NVFP4, (512, 4080), (4, 4)),
        ("applegpu_g17s", NVFP4, (480, 4096), (4, 4)),
        ("applegpu_g17s", NVFP4, (4096, 512), (4, 2)),
        ("applegpu_g17s", MXFP4, (512, 4096), (4, 4)),
        ("applegpu_g17s", AFFINE4, (512, 4096), (4, 4)),
        ("applegpu_g17g", NVFP4, (512, 4096), (4, 4)),
        ("applegpu_g17d", NVFP4, (512, 4096), (4, 4)),
        ("applegpu_g16s", NVFP4, (512, 4096), (4, 4)),
        ("applegpu_g18s", NVFP4, (512, 4096), (4, 4)),
    ],
)
def test_rows_of_a_simdgroup_are_those_of_mlx(architecture, fmt, widths, rows):
    """Two of large dense nvfp4 matrices on an M5 Max, else four; the bits are the same."""
    hidden, intermediate = widths
    layer = Layer(15, fmt, mx.bfloat16)
    x, norm = layer.array(1, 1, hidden), layer.norm(hidden)
    weights = layer.mlp(hidden, intermediate)
    runs = rows == (2, 4)
    with metal(architecture=architecture, **({} if runs else {"compiler": lambda *_: None})):
        found = blocks.mlp_block(x, norm, weights)
        mx.eval(found)
    launches = metal_sim.take_launches()
    names = [re.search(r"__(?:true|false)__(\d)__1__1__", one.kernel)[1] for one in launches]
    assert tuple(map(int, names)) == rows
    sizes = intermediate, hidden
    assert [one.groups[0] for one in launches] == [
        -(-size // (2 * each)) for size, each in zip(sizes, rows, strict=True)
    ]
    if runs:
        assert_same_bits(found, x + mlp_chain(normed(x, norm, True), weights, True))


@simulated_only
def test_experts_take_four_rows_on_every_gpu():
    layer = Layer(16, NVFP4, mx.bfloat16)
    x, experts = layer.array(1, 512), layer.mlp(512, 4096, 2)
    with metal(architecture="applegpu_g17s", compiler=lambda *_: None):
        mx.eval(ops.moe_decode(x, *experts, mx.zeros((1, 1), mx.int32), mx.ones((1, 1))))
    gate_up, down = metal_sim.take_launches()
    assert (gate_up.groups, down.groups) == ((4096 // 8, 1, 1), (512 // 4, 1, 1))


def test_gradients_are_those_of_the_chain():
    layer = Layer(9, AFFINE4, mx.float32)
    x, norm, weights = layer.array(1, 3, HIDDEN), layer.norm(HIDDEN), layer.mlp(HIDDEN, 128)

    def block(x, scale):
        return mx.sin(blocks.mlp_block(x, (scale, EPS), weights)).sum()

    with metal():
        found = mx.grad(block, (0, 1))(x, norm[0])
        mx.eval(found)
    for a, b in zip(found, mx.grad(block, (0, 1))(x, norm[0]), strict=True):
        assert mx.abs(b).max().item() > 0
        assert mx.allclose(a, b, 1e-4, 1e-5).item()


def test_gradients_of_attend_are_those_of_its_ops():
    layer = Layer(14, DENSE, mx.float32)
    made, _ = attention(layer, 1, 3, 40, "fp32", True)
    x, q, *others = made.args

    def block(x, q):
        return mx.sin(blocks.attend(x, q, *others, **made.keywords)).sum()

    with metal():
        found = mx.grad(block, (0, 1))(x, q)
        mx.eval(found)
    for a, b in zip(found, mx.grad(block, (0, 1))(x, q), strict=True):
        assert mx.abs(b).max().item() > 0
        assert mx.allclose(a, b, 1e-4, 1e-5).item()


def test_errors_name_the_op_and_its_argument():
    layer = Layer(10, AFFINE4, mx.bfloat16)
    norm, weights = layer.norm(HIDDEN), layer.mlp(HIDDEN, 128)
    with metal(), pytest.raises(ValueError, match=r"\[rms_norm\] weight must have shape \(128\)"):
        blocks.mlp_block(layer.array(1, 1, 128), norm, weights)


@pytest.mark.parametrize(
    "name, kv_format",
    [
        ("affine4", "auto"),
        pytest.param("fp8", "fp8", marks=pytest.mark.slow),
        pytest.param("not interleaved", "auto", marks=pytest.mark.slow),
    ],
)
def test_whole_models(tmp_path, name, kv_format):
    """Two sequences of a model, with a cache that is trimmed on the way."""
    layout, quantization, sizes = FOLDERS[name]
    config = tiny_config(**sizes)
    path = write_checkpoint(tmp_path, config, layout=layout, quantization=quantization)
    model, _ = load_model(path, kv_format=kv_format)
    # As many tokens as a block takes: a longer prompt has sums of another order.
    prompt, steps = mx.array(np.random.default_rng(2).integers(0, 256, (2, 8))), 24
    with metal():
        found = run(model, prompt, steps)
    if not GPU:
        names = [launch.kernel for launch in metal_sim.take_launches()]
        assert sum("mla_unembed" in name for name in names) == (1 + steps) * len(model.layers)
    with cpu(), reference_path():
        expected = run(model, prompt, steps)
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


def test_what_is_left_to_the_ops():
    x = mx.zeros((1, 16, 8))
    with metal():
        assert blocks.takes(x) and not blocks.takes(mx.zeros((1, 17, 8)))
        assert blocks.takes_experts(x, 1024, 8) and not blocks.takes_experts(x, 1025, 8)
        # A pair of every token and shared expert has to fit into threadgroup memory.
        assert blocks.takes_experts(x, 64, 55) and not blocks.takes_experts(x, 64, 56)
        with reference_path():
            assert not blocks.takes(x)
