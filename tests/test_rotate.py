"""Rotary embedding equals the reference and MLX's own chain bit for bit, on every path."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import DTYPES, assert_same_bits, bits_of
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_backend import metal, on_both, simulated_only

from glm_fused import ops
from glm_fused.models.rope import Rope, RopeParameters
from glm_fused.ops import metal_sim, stock

ROPE = Rope(RopeParameters(theta=1e4), 16)


def draw(rng, shape, dtype):
    x = rng.standard_normal(shape, dtype=np.float32)
    x[rng.random(shape) < 0.1] = -0.0
    return mx.array(x).astype(dtype)


def positions(first, length, paddings):
    """Those of sequences with so many columns of padding, whose positions are negative."""
    columns = np.arange(first, first + length)[None]
    return mx.array((columns - np.array(paddings)[:, None]).astype(np.int32))


def view(x, how):
    """The values of x [b, h, l, d] in an array of other strides."""
    if how == "heads":  # as a projection gives them
        return mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)
    if how == "split":  # as attention takes them
        return mx.split(mx.concatenate([x, x], axis=-1), [x.shape[-1]], axis=-1)[1]
    if how == "backwards":
        return mx.contiguous(x[..., ::-1, ::-1])[..., ::-1, ::-1]
    return mx.repeat(x, 2, axis=-1)[..., ::2] if how == "columns" else x


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_fused_equals_the_reference_and_the_chain(data):
    batch, heads, length = (data.draw(st.integers(1, n)) for n in (3, 4, 5))
    dtype = data.draw(st.sampled_from(list(DTYPES.values())))
    padded = data.draw(st.booleans())
    paddings = [data.draw(st.integers(0, 9)) for _ in range(batch)] if padded else [0]
    first = data.draw(st.sampled_from([0, 1, 100, 10**6]))
    columns = 16 + data.draw(st.integers(0, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    x = view(
        draw(rng, (batch, heads, length, columns), dtype),
        data.draw(st.sampled_from(["", "heads", "split", "columns", "backwards"])),
    )
    angles = ROPE.angles(positions(first, length, paddings))
    interleaved = data.draw(st.booleans())
    fused = ops.rotate(x, *angles, interleaved, reference=False)
    assert (fused.shape, fused.dtype) == (x.shape, dtype)
    assert_same_bits(fused, ops.rotate(x, *angles, interleaved, reference=True))
    assert_same_bits(fused, stock.rotate(x, *angles, interleaved))


def slips(x, cos, sin):
    """The rotation with a multiply-add, the other way round, and of the other pairs."""
    a, b, c, s = (np.array(v, np.float64) for v in (x[..., 0::2], x[..., 1::2], cos, sin))
    product = (b * s).astype(np.float32).astype(np.float64)
    first = (a * c - product).astype(np.float32)
    second = (b * c + (a * s).astype(np.float32).astype(np.float64)).astype(np.float32)
    yield mx.array(np.stack([first, second], axis=-1).reshape(x.shape))
    yield ops.rotate(x, cos, -sin)
    yield ops.rotate(x, cos, sin, False)


def test_slips_have_other_bits():
    x = draw(np.random.default_rng(0), (1, 2, 9, 16), mx.float32)
    angles = ROPE.angles(positions(5, 9, [0]))
    right = bits_of(ops.rotate(x, *angles))
    for slip in slips(x, *angles):
        assert (bits_of(slip) != right).any()


def test_close_to_float64():
    x = draw(np.random.default_rng(1), (2, 3, 4, 20), mx.float32)
    angles = ROPE.angles(positions(7, 4, [0, 2]))
    wide, c, s = (np.array(v, np.float64) for v in (x, *angles))
    expected = wide.copy()
    expected[..., 0:16:2] = wide[..., 0:16:2] * c - wide[..., 1:16:2] * s
    expected[..., 1:16:2] = wide[..., 1:16:2] * c + wide[..., 0:16:2] * s
    np.testing.assert_allclose(np.array(ops.rotate(x, *angles)), expected, rtol=0, atol=1e-6)


def test_a_row_does_not_depend_on_their_number():
    x = draw(np.random.default_rng(2), (2, 40, 70, 64), mx.bfloat16)
    cos, sin = ROPE.angles(positions(0, 70, [0, 3]))
    together = ops.rotate(x, cos, sin)  # on several threads
    parts = [
        ops.rotate(x[:, :, i : i + 1], cos[:, :, i : i + 1], sin[:, :, i : i + 1])
        for i in range(70)
    ]
    assert_same_bits(together, mx.concatenate(parts, axis=2))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_metal_equals_the_cpu(dtype, interleaved):
    rng = np.random.default_rng(3)
    for how, columns in (("", 16), ("heads", 21), ("split", 24), ("columns", 17)):
        x = view(draw(rng, (2, 3, 5, columns), dtype), how)
        for paddings in ([0], [1, 4]):
            angles = ROPE.angles(positions(2, 5, paddings))
            assert_same_bits(*on_both(lambda: ops.rotate(x, *angles, interleaved)))  # noqa: B023


@simulated_only
@pytest.mark.parametrize("contract", [False, True], ids=["separate", "contracted"])
def test_the_launch_is_one_and_clean(contract):
    x = view(draw(np.random.default_rng(4), (2, 3, 5, 24), mx.float32), "heads")
    angles = ROPE.angles(positions(2, 5, [0, 1]))
    expected = ops.rotate(x, *angles)
    with metal(trace=True, contract=contract):
        y = ops.rotate(x, *angles)
        mx.eval(y)
    (launch,) = metal_sim.take_launches()
    assert launch.report.clean, launch.report
    assert_same_bits(y, expected)  # no step is left to the compiler


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (2, 1, 0, 4)])
def test_nothing_to_rotate(shape):
    angles = mx.ones((1, 1, shape[2], 2))
    for reference in (False, True):
        y = ops.rotate(mx.ones(shape), angles, angles, reference=reference)
        mx.eval(y)
        assert y.shape == shape
    x = mx.random.normal((1, 2, 3, 5))
    none = mx.ones((1, 1, 3, 0))
    assert_same_bits(ops.rotate(x, none, none), x)


def test_refusals():
    x, angles = mx.ones((2, 3, 5, 8)), mx.ones((1, 1, 5, 4))
    limits = "cos must be [2 or 1, 1, 5, at most 4] but has shape "
    for message, *bad in (
        ("x must be float32, float16 or bfloat16 but is int32.", x.astype(mx.int32)),
        ("x must be [b, h, l, d] but has shape (3,5,8).", x[0]),
        (limits + "(1,1,5,5).", x, mx.ones((1, 1, 5, 5))),
        (limits + "(1,1,4,4).", x, angles[:, :, :4]),
        (limits + "(3,1,5,4).", x, mx.ones((3, 1, 5, 4))),
        ("sin must have shape (1,1,5,4) but has (1,1,5,3).", x, angles, angles[..., :3]),
        ("cos must be float32 but is bfloat16.", x, angles.astype(mx.bfloat16)),
        ("sin must be float32 but is int32.", x, angles, angles.astype(mx.int32)),
    ):  # fmt: skip
        given = [*bad, *[x, angles, angles][len(bad) :]]
        with pytest.raises(ValueError, match=re.escape(f"[rotate] {message}")):
            ops.rotate(*given)
    with pytest.raises(TypeError, match="expects mlx arrays and numbers"):
        ops.rotate(x, angles, None)
