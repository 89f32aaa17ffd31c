"""FP8 weights: e4m3 codes with a scale for each square of 128 rows and columns."""

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import DTYPES, E4M3, assert_same_bits, dequantized, random_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_fused import ops
from glm_fused.formats.weights import named
from glm_fused.ops import stock

FORMAT = ("fp8", 8, 128)


def one_hot(k: int, column: int) -> mx.array:
    x = np.zeros((1, k), np.float32)
    x[0, column] = 1
    return mx.array(x)


def test_every_code_and_every_square_is_decoded():
    """Each column by itself: the product of one code and its scale; a row with a NaN is NaN."""
    codes = np.arange(300 * 256, dtype=np.uint32).reshape(300, 256) * 37 % 256
    codes[:, 1::3] = (codes[:, 1::3] + np.arange(300)[:, None]) % 256
    codes[np.isnan(E4M3[codes])] = 0
    codes[[7, 299], [5, 250]] = 127, 255
    good = ~np.isnan(E4M3[codes]).any(axis=1)
    scales = np.float32(0.3) + np.arange(6, dtype=np.float32).reshape(3, 2)
    w = ops.Weight((mx.array(codes.astype(np.uint8)), mx.array(scales)), named("fp8"))
    seen = set()
    for column in (0, 1, 7, 127, 128, 250, 255):
        seen |= set(codes[good, column].tolist())
        square = scales[np.arange(300) // 128, column // 128]
        expected = E4M3[codes[:, column]].astype(np.float32) * square
        for reference in (False, True):
            found = np.array(ops.quantized_matvec(one_hot(256, column), w, reference=reference))[0]
            assert np.array_equal(found[good], expected[good])
            assert np.isnan(found[~good]).all()
    assert len(seen) == 254


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_rows_of_many_squares_equal_the_reference(data):
    """Tiles begin and end anywhere in a square, and the last group of rows overlaps another."""
    n, k = data.draw(st.integers(1, 700)), 128 * data.draw(st.integers(1, 6))
    vectors = data.draw(st.sampled_from([1, 2, 3, 9]))
    dtype, scale = (data.draw(st.sampled_from(list(DTYPES.values()))) for _ in range(2))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    w = random_weight(rng, (n, k), FORMAT, scale)
    x = mx.array(rng.standard_normal((vectors, k), dtype=np.float32)).astype(dtype)
    fused = ops.quantized_matvec(x, w, reference=False)
    mx.eval(fused)
    assert_same_bits(fused, ops.quantized_matvec(x, w, reference=True))
    values = dequantized(w)
    wide = np.array(x.astype(mx.float32), np.float64)
    expected, terms = wide @ values.T, np.abs(wide) @ np.abs(values).T  # terms may cancel
    error = np.abs(np.array(fused.astype(mx.float32)) - expected)
    rounding = {mx.float32: 0, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    assert (error <= rounding * np.abs(expected) + 1e-6 * terms).all()
    # The control: with the scales of another square the same comparison fails.
    if scale == mx.float32 and dtype == mx.float32 and n > 128:
        moved = w._replace(planes=(w.planes[0], mx.roll(w.planes[1], 1, axis=0)))
        other = np.array(ops.quantized_matvec(x, moved))
        assert np.abs(other - expected).max() > 1e-3 * np.abs(expected).max()


def test_experts_end_within_a_square():
    """Each expert of 133 rows has two rows of squares of its own."""
    rng = np.random.default_rng(3)
    gate, up = (random_weight(rng, (5, 133, 256), FORMAT, mx.float32) for _ in range(2))
    down = random_weight(rng, (5, 256, 133), ("dense", 0, 0), mx.float32)
    x = mx.array(rng.standard_normal((3, 256), dtype=np.float32))
    slots = mx.array(rng.integers(0, 5, (3, 2)).astype(np.int32))
    scores = mx.array(rng.random((3, 2), dtype=np.float32))
    fused = ops.moe_decode(x, gate, up, down, slots, scores, reference=False)
    mx.eval(fused)
    assert_same_bits(fused, ops.moe_decode(x, gate, up, down, slots, scores, reference=True))
    chain = stock.moe_decode(x, gate, up, down, slots, scores)
    assert mx.abs(fused - chain).max().item() <= 1e-5 * mx.abs(chain).max().item()


def test_scales_have_a_row_for_every_128_rows():
    w = random_weight(np.random.default_rng(4), (130, 256), FORMAT)
    wrong = w._replace(planes=(w.planes[0], w.planes[1][:1]))
    with pytest.raises(ValueError, match=r"w\.scales must have shape \(2,2\) but has \(1,2\)"):
        ops.quantized_matvec(mx.zeros((1, 256)), wrong)
    with pytest.raises(ValueError, match=r"130 columns are no whole number of groups of 128"):
        ops.quantized_matvec(mx.zeros((1, 130)), w)
