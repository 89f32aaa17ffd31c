"""Norms equal the reference bit for bit on every path, and their definition in other words."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from formats_under_test import DTYPES, assert_same_bits, bits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_backend import metal, on_both, simulated_only

from glm_fused import load, ops
from glm_fused.checkpoint.paths import bundled_folder
from glm_fused.models import layers
from glm_fused.ops import metal_sim, stock

pytestmark = pytest.mark.usefixtures("several_threads")

NORMS = {"rms_norm": ("weight",), "layer_norm": ("weight", "bias")}
EPS = 1e-5

each_norm = pytest.mark.parametrize("name", NORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def draw(rng, shape, dtype, scale=1.0):
    return mx.array(rng.standard_normal(shape, dtype=np.float32) * scale).astype(dtype)


def arguments(name, n, dtype, rng):
    """The weight, and the bias where there is one."""
    return [draw(rng, (n,), dtype) for _ in NORMS[name]]


def view(rng, x, how):
    """The values of x [..., n] in an array of other strides."""
    if how == "columns":
        return mx.repeat(x, 2, axis=-1)[..., ::2]
    if how == "backwards":
        return mx.contiguous(x[..., ::-1])[..., ::-1]
    if how == "part":
        return mx.concatenate([x, x], axis=-1)[..., : x.shape[-1]]
    if how == "swapped" and x.ndim > 2:
        return mx.contiguous(x.swapaxes(0, -2)).swapaxes(0, -2)
    return x


def by_definition(name, x, weight, bias=None):
    """The norm of x [rows, n], with dense dot products for its sums and numpy for the rest."""
    single, dtype = np.float32, x.dtype
    n = single(x.shape[-1])

    def dot(a, b):
        w = ops.Weight.dense(mx.array(b[None]))
        return single(ops.quantized_matvec(mx.array(a[None]), w).item())

    def rounded(a):
        return np.array(mx.array(a).astype(dtype).astype(mx.float32))

    scale, shift = (None if a is None else np.array(a.astype(mx.float32)) for a in (weight, bias))
    rows = []
    for row in np.array(x.astype(mx.float32)):
        if shift is not None:
            row = row - dot(row, np.ones_like(row)) / n
        y = rounded(row * (single(1) / np.sqrt(dot(row, row) / n + single(EPS))))
        y = rounded(y * scale)
        rows.append(y if shift is None else rounded(y + shift))
    return mx.array(np.stack(rows)).astype(dtype)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_fused_equals_the_reference(data):
    name = data.draw(st.sampled_from(list(NORMS)))
    op = getattr(ops, name)
    dtypes = st.sampled_from(list(DTYPES.values()))
    dtype = data.draw(dtypes)
    shape = data.draw(st.lists(st.integers(1, 4), max_size=4))
    n = data.draw(st.one_of(st.integers(1, 300), st.sampled_from([512, 640, 6144])))
    how = data.draw(st.sampled_from(["", "columns", "backwards", "part", "swapped"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = draw(rng, (*shape, n), dtype, data.draw(st.sampled_from([1e-3, 1.0, 100.0])))
    others = [draw(rng, (n,), data.draw(dtypes)) for _ in NORMS[name]]
    eps = data.draw(st.sampled_from([1e-6, 1e-5, 0.5]))
    fused = op(view(rng, x, how), *others, eps, reference=False)
    assert (fused.shape, fused.dtype) == (x.shape, dtype)
    assert_same_bits(fused, op(x, *others, eps, reference=False))
    assert_same_bits(fused, op(view(rng, x, how), *others, eps, reference=True))


@each_dtype
@each_norm
@pytest.mark.parametrize("n", [3, 128, 200, 6144])
def test_the_definition_in_other_words(name, n, dtype):
    rng = np.random.default_rng(n)
    x, others = draw(rng, (2, n), dtype), arguments(name, n, dtype, rng)
    assert_same_bits(getattr(ops, name)(x, *others, EPS), by_definition(name, x, *others))


def slips(name, x, weight, bias=None):
    """The norm with an epsilon beside the root, and with a rounding fewer."""
    wide = x.astype(mx.float32)
    if bias is not None:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    mean = wide.square().mean(axis=-1, keepdims=True)
    shift = 0 if bias is None else bias
    inverse = 1 / mx.sqrt(mean + EPS)
    beside = (wide * (1 / (mx.sqrt(mean) + EPS))).astype(x.dtype)
    yield "eps", (beside * weight + shift).astype(x.dtype)
    yield "rounding", (wide * inverse * weight.astype(mx.float32) + shift).astype(x.dtype)


@each_norm
def test_slips_have_other_bits(name):
    rng = np.random.default_rng(0)
    x = draw(rng, (50, 200), mx.bfloat16, 0.01)
    others = arguments(name, 200, mx.bfloat16, rng)
    right = bits_of(getattr(ops, name)(x, *others, EPS))
    for slip, y in slips(name, x, *others):
        assert (bits_of(y) != right).any(), slip


@each_dtype
@each_norm
def test_close_to_float64(name, dtype):
    rng = np.random.default_rng(1)
    x, others = draw(rng, (7, 500), dtype), arguments(name, 500, dtype, rng)
    wide, scale, *shift = (np.array(a.astype(mx.float32), np.float64) for a in (x, *others))
    if shift:
        wide = wide - wide.mean(axis=-1, keepdims=True)
    expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + EPS) * scale
    expected = expected + shift[0] if shift else expected
    found = np.array(getattr(ops, name)(x, *others, EPS).astype(mx.float32))
    tolerance = {mx.float32: 1e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}[dtype]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    stock_op = getattr(stock, name)
    found = np.array(stock_op(x, *others, EPS).astype(mx.float32))
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@each_norm
def test_a_row_does_not_depend_on_their_number(name):
    rng = np.random.default_rng(2)
    x, others = draw(rng, (300, 640), mx.bfloat16), arguments(name, 640, mx.bfloat16, rng)
    op = getattr(ops, name)
    together = op(x, *others, EPS)  # on several threads
    assert_same_bits(together, mx.concatenate([op(x[i : i + 1], *others, EPS) for i in range(300)]))


@each_norm
def test_zeros_and_what_is_not_finite(name):
    x = np.zeros((4, 130), np.float32)
    x[1, 129], x[2, 0], x[3, 5] = np.nan, np.inf, 3e38
    ones = [mx.ones(130) for _ in NORMS[name]]
    fused, reference = (getattr(ops, name)(mx.array(x), *ones, EPS, reference=r) for r in (0, 1))
    assert mx.array_equal(fused, reference, equal_nan=True)
    assert mx.isnan(fused).sum(axis=-1).tolist()[1] == 130
    assert fused[0].tolist() == [len(NORMS[name]) - 1.0] * 130


EVERY_BIT = """
import test_norms
print(test_norms.digest())
"""


def digest():
    """Of norms in every dtype, whatever the instruction set."""
    rng = np.random.default_rng(3)
    found = hashlib.sha256()
    for name in NORMS:
        for dtype in DTYPES.values():
            for n in (1, 100, 128, 333):
                x, others = draw(rng, (3, n), dtype), arguments(name, n, dtype, rng)
                found.update(bits_of(getattr(ops, name)(x, *others, EPS)).tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("kernels", ["avx2", "portable"])
def test_every_instruction_set_gives_the_same_bits(kernels):
    path = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
    environment = {**os.environ, "GLM_FUSED_KERNELS": kernels, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", EVERY_BIT], env=environment, capture_output=True, text=True
    )
    if "cannot run here" in run.stderr:
        pytest.skip(run.stderr.splitlines()[-1])
    assert run.stdout.split() == [digest()], run.stderr


@each_dtype
@each_norm
def test_metal_equals_the_cpu(name, dtype):
    rng = np.random.default_rng(4)
    op = getattr(ops, name)
    for how, n in (("", 1), ("part", 130), ("swapped", 128), ("columns", 333)):
        x, others = draw(rng, (2, 3, n), dtype), arguments(name, n, dtype, rng)
        assert_same_bits(*on_both(lambda: op(view(rng, x, how), *others, EPS)))  # noqa: B023


@each_norm
def test_metal_takes_weights_of_another_dtype(name):
    rng = np.random.default_rng(5)
    x, others = draw(rng, (2, 100), mx.bfloat16), arguments(name, 100, mx.float32, rng)
    assert_same_bits(*on_both(lambda: getattr(ops, name)(x, *others, EPS)))


@simulated_only
@each_norm
@pytest.mark.parametrize("contract", [False, True], ids=["separate", "contracted"])
def test_the_launch_is_one_and_clean(name, contract):
    rng = np.random.default_rng(6)
    x, others = draw(rng, (3, 2, 200), mx.float32), arguments(name, 200, mx.float32, rng)
    expected = getattr(ops, name)(x, *others, EPS)
    with metal(trace=True, contract=contract):
        y = getattr(ops, name)(x, *others, EPS)
        mx.eval(y)
    (launch,) = metal_sim.take_launches()
    assert launch.groups == (6, 1, 1)
    assert launch.report.clean, launch.report
    assert_same_bits(y, expected)  # no step is left to the compiler


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (2, 1, 2, 1, 3, 5)])
@each_norm
def test_other_numbers_of_axes(name, shape):
    x, others = mx.ones(shape), [mx.ones(5) for _ in NORMS[name]]
    y, reference = (getattr(ops, name)(x, *others, EPS, reference=r) for r in (False, True))
    assert y.shape == shape
    assert_same_bits(y, reference)


@each_norm
def test_refusals(name):
    op = getattr(ops, name)
    x, others = mx.ones((2, 5)), [mx.ones(5) for _ in NORMS[name]]
    last = NORMS[name][-1]
    for message, *bad in (
        (f"[{name}] x must be float32, float16 or bfloat16 but is int32.", x.astype(mx.int32)),
        (f"[{name}] x must be [..., n] with at least one column but has shape (2,0).", x[:, :0]),
        (f"[{name}] {last} must have shape (5) but has (4).", x, *others[:-1], mx.ones(4)),
        (f"[{name}] {last} must be float32, float16 or bfloat16 but is int32.",
         x, *others[:-1], mx.ones(5, mx.int32)),
    ):  # fmt: skip
        given = [*bad, *[x, *others][len(bad) :]]
        with pytest.raises(ValueError, match=re.escape(message)):
            op(*given, EPS)
    for eps in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"eps must be greater than 0 but is"):
            op(x, *others, eps)
    with pytest.raises(TypeError, match=r"expects mlx arrays and numbers .* eps str"):
        op(x, *others, "1")


def test_layers_are_stock_ones_with_our_ops():
    """mlx-lm's tools know them by their class and parameters."""
    for ours, theirs in (
        (layers.RMSNorm(12, eps=1e-4), nn.RMSNorm(12, eps=1e-4)),
        (layers.LayerNorm(12, eps=1e-4), nn.LayerNorm(12, eps=1e-4)),
    ):
        assert isinstance(ours, type(theirs))
        assert ours.parameters().keys() == theirs.parameters().keys()
        x = mx.random.normal((3, 12))
        np.testing.assert_allclose(np.array(ours(x)), np.array(theirs(x)), rtol=1e-5, atol=1e-6)


def test_a_decode_step_has_no_norm_or_rotation_of_mlx(tmp_path, monkeypatch):
    monkeypatch.setattr(ops.blocks, "takes", lambda *_: False)
    model, _ = load(bundled_folder())
    cache = model.make_cache()
    mx.eval(model(mx.arange(1, 70)[None], cache=cache))
    mx.export_to_dot(str(tmp_path / "step.dot"), logits=model(mx.array([[5]]), cache=cache))
    nodes = re.findall(r'label ="(\w+)", shape=rectangle', (tmp_path / "step.dot").read_text())
    assert {"RmsNorm", "LayerNorm", "Rotate"} <= set(nodes)
    # The angles are those of a page that the prompt made.
    assert not {"Rsqrt", "Square", "Subtract", "Cos", "Sin"} & set(nodes)
    assert len(nodes) < 600
