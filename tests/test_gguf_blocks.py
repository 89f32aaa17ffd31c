"""GGUF's blocks have the values that the gguf package's dequantizers give them, bit for bit."""

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import GGUFS, format_id, found_format, gguf_dequantized, random_weight

from glm_fused import ops
from glm_fused.formats.weights import FORMATS, GGUF, dequantize

COLUMNS = 1024
ALL_BYTES = np.arange(256, dtype=np.uint8)


def weight(fmt, planes):
    return ops.Weight([mx.array(planes)], found_format(fmt))


def blocks(fmt, rng, rows=64):
    found = found_format(fmt)
    size = COLUMNS // found.group_size * found.planes[0].count
    return rng.integers(0, 256, (rows, size), dtype=np.uint8)


def assert_same_values(w):
    """NaN where the other is NaN, else the same bits."""
    expected = gguf_dequantized(w)
    found = np.array(dequantize(w, mx.float32))
    assert found.shape == expected.shape
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    np.testing.assert_array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("fmt", GGUFS, ids=format_id)
def test_values_of_random_blocks(fmt):
    rng = np.random.default_rng(0)
    assert_same_values(random_weight(rng, (3, 16, COLUMNS), fmt))
    # Random bytes in the place of scales, too: they are NaN, infinite and subnormal among others.
    assert_same_values(weight(fmt, blocks(fmt, rng)))


@pytest.mark.parametrize("fmt", GGUFS, ids=format_id)
def test_values_of_adversarial_blocks(fmt):
    rng = np.random.default_rng(1)
    size = blocks(fmt, rng).shape[-1]
    for byte in (0, 255, 0x7C, 0xFC, 0x80, 0x01):
        assert_same_values(weight(fmt, np.full((2, size), byte, np.uint8)))
    # Each byte of a block in turn has each value, among zeros and among random ones.
    count = found_format(fmt).planes[0].count
    for background in (np.zeros(size, np.uint8), blocks(fmt, rng, 1)[0]):
        every = np.repeat(background[None], 256, 0)
        for at in range(count):
            changed = every.copy()
            changed[:, at] = ALL_BYTES
            assert_same_values(weight(fmt, changed))


@pytest.mark.parametrize("fmt", GGUFS, ids=format_id)
def test_a_changed_bit_changes_values(fmt):
    """The comparison above tells blocks apart: every byte counts."""
    rng = np.random.default_rng(2)
    w = random_weight(rng, (1, 256), fmt)
    right = np.array(dequantize(w, mx.float32)).view(np.uint32)
    for at in range(w.planes[0].shape[-1]):
        changed = np.array(w.planes[0])
        changed[0, at] ^= 0x55
        wrong = np.array(dequantize(weight(fmt, changed), mx.float32)).view(np.uint32)
        assert (wrong != right).any(), at


def test_the_registry_has_ggmls_sizes():
    import gguf

    for fmt in GGUF:
        kind = gguf.GGMLQuantizationType[fmt.name.removeprefix("ggml-").upper()]
        assert gguf.GGML_QUANT_SIZES[kind] == (fmt.group_size, fmt.planes[0].count)
        assert [plane.name for plane in fmt.planes] == ["weight"]
        assert fmt.bits_per_weight == 8 * fmt.planes[0].count / fmt.group_size


def test_columns_that_are_no_whole_blocks():
    w = ops.Weight([mx.zeros((4, 144), mx.uint8)], FORMATS["q4_k"])
    with pytest.raises(ValueError, match=r"w: 288 columns are no whole number of groups of 256"):
        ops.quantized_matvec(mx.zeros((1, 288)), w)
    with pytest.raises(ValueError, match=r"w\.weight must have shape \(4,288\) but has \(4,144\)"):
        ops.quantized_matvec(mx.zeros((1, 512)), w)
