"""Appending to a cache in place equals MLX's update, and nobody sees another's rows."""

from __future__ import annotations

import copy
import re

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metal_backend import cpu, metal, on_both

from glm_fused import ops
from glm_fused.formats.kv_rows import PACKED, pack, row_bytes, unpack
from glm_fused.host import to_numpy
from glm_fused.ops import metal_sim

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
KINDS = [*FLOATS, mx.uint8, mx.int8]
CAPACITY = 64
each_place = pytest.mark.parametrize(
    "place", [pytest.param(cpu, id="on_cpu"), pytest.param(metal, id="on_metal")]
)


def rows(rng, batch, count, width, dtype):
    words = rng.integers(0, 256, (batch, 1, count, width * dtype.size), dtype=np.uint8)
    return mx.array(words).view(dtype)


def words_of(a):
    return to_numpy(mx.contiguous(a).view(mx.uint8))


def empty(batch, width, dtype):
    """A buffer of NaNs, or of the like."""
    words = mx.full((batch, 1, CAPACITY, width * dtype.size), 0xFF, dtype=mx.uint8)
    buffer = words.view(dtype)
    mx.eval(buffer)
    return buffer


class Sequence:
    """A cache, and what MLX's own update makes of it."""

    def __init__(self, batch, width, dtype):
        self.buffer, self.length = empty(batch, width, dtype), 0
        self.expected = np.zeros((batch, 0, width * dtype.size), np.uint8)

    def append(self, new, evaluate):
        found = ops.append_rows(self.buffer, new, self.length)
        expected = [self.expected[:, : self.length], words_of(new)[:, 0]]
        self.expected = np.concatenate(expected, axis=1)
        self.length += new.shape[2]
        assert found.shape == (new.shape[0], self.length, new.shape[3])
        if evaluate:
            self.check(found)
        return found

    def check(self, found):
        assert np.array_equal(words_of(found), self.expected[:, : self.length])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_forks_and_trims_see_their_own_rows(data):
    """Sequences that share a beginning, in one memory at first."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype, batch, width = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(1, 3)), 5
    sequences = [Sequence(batch, width, dtype)]
    for _ in range(data.draw(st.integers(1, 14))):
        which = data.draw(st.integers(0, len(sequences) - 1))
        sequence = sequences[which]
        step = data.draw(st.sampled_from(["append", "append", "append", "fork", "trim", "cut"]))
        if step == "fork":
            sequences.append(copy.deepcopy(sequence))
        elif step == "trim":
            sequence.length = data.draw(st.integers(0, sequence.length))
        elif step == "cut" and batch > 1:  # as a batch that loses a row
            kept = data.draw(st.integers(1, batch))
            new = Sequence(kept, width, dtype)
            new.buffer, new.length = sequence.buffer[:kept], sequence.length
            new.expected = sequence.expected[:kept]
            sequences.append(new)
        elif sequence.length < CAPACITY - 4:
            count = data.draw(st.integers(1, 4))
            new = rows(rng, sequence.buffer.shape[0], count, width, dtype)
            if data.draw(st.booleans()):
                new = mx.contiguous(new.swapaxes(2, 3)).swapaxes(2, 3)
            sequence.append(new, data.draw(st.booleans()))
    for sequence in sequences:
        sequence.check(sequence.buffer[:, 0, : sequence.length])


def test_nothing_is_copied_whoever_holds_the_cache():
    """A step that is on its way holds the cache, and so does a copy of it."""
    buffer = mx.zeros((1, 1, 1 << 16, 64))
    ops.append_rows(buffer, mx.ones((1, 1, 3, 64)), 0)
    mx.eval(buffer)
    held = []
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for i in range(8):
        held.append(
            (copy.copy(buffer), ops.append_rows(buffer, mx.full((1, 1, 1, 64), 1.0 * i), 3 + i))
        )
        if i % 2:
            mx.async_eval(buffer)
    mx.eval(buffer)
    assert mx.get_peak_memory() - before < buffer.nbytes / 100
    for i, (_, first) in enumerate(held):
        assert first[0, 3:, 0].tolist() == list(range(i + 1))


def test_a_fork_copies_once():
    """The control of the test above: the second of two that append the same row has to copy."""
    buffer = mx.zeros((1, 1, 1 << 16, 64))
    ops.append_rows(buffer, mx.ones((1, 1, 3, 64)), 0)
    mx.eval(buffer)
    fork, copied = copy.copy(buffer), []
    for which in (buffer, fork, fork, buffer):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        ops.append_rows(which, mx.ones((1, 1, 1, 64)), 3 + len(copied) // 2)
        mx.eval(which)
        copied.append(mx.get_peak_memory() - before >= buffer.nbytes)
    assert copied == [False, True, False, False]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_metal_equals_the_cpu(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype, batch = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(1, 3))
    width, count = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 9))
    at, is_copied = data.draw(st.integers(0, CAPACITY - count)), data.draw(st.booleans())
    old, new = rows(rng, batch, CAPACITY, width, dtype), rows(rng, batch, count, width, dtype)
    if data.draw(st.booleans()):
        new = mx.contiguous(new.swapaxes(2, 3)).swapaxes(2, 3)

    def run():
        buffer = old + mx.zeros_like(old) if dtype in (mx.uint8, mx.int8) else mx.contiguous(old)
        mx.eval(buffer)
        held = copy.copy(buffer) if is_copied else None
        found = mx.contiguous(ops.append_rows(buffer, new, at))
        mx.eval(found, buffer)
        del held
        return found

    a, b = on_both(run)
    assert np.array_equal(words_of(a), words_of(b))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("widths", [(70, 3), (5, 33), (4, 0)])
def test_a_pair_is_two(dtype, held, widths):
    """In memory of their own, and copied where another array has the rows after `at`."""
    rng = np.random.default_rng(7)
    old = [rows(rng, 2, CAPACITY, width, dtype) for width in widths]
    new = [rows(rng, 2, 3, width, dtype) for width in widths]
    mx.eval(old, new)

    def run():
        buffers = [a.view(dtype) for a in map(mx.array, old)]
        copies = list(map(copy.copy, buffers)) if held else []
        first = ops.append_pair(buffers[0], new[0], buffers[1], new[1], 5)
        made = [mx.contiguous(a) for a in (*first, *(b[..., :8, :] for b in buffers))]
        mx.eval(made, copies)
        return made

    there, here = on_both(run)
    for a, b, i in zip(there, here, (0, 1, 0, 1), strict=True):
        expected = np.concatenate([words_of(old[i])[:, :, :5], words_of(new[i])], axis=2)
        assert np.array_equal(words_of(a).ravel(), expected.ravel())
        assert np.array_equal(words_of(b).ravel(), expected.ravel())


def wide(rng, batch, length, width, dtype):
    """Values over many powers of two, of unlike strides, with a row of zeros."""
    values = rng.standard_normal((batch, width, 2 * length), dtype=np.float32)
    values *= np.exp2(rng.integers(-40, 40, (batch, 1, 2 * length)).astype(np.float32))
    values[0, :, 0] = 0
    return mx.array(values).astype(dtype).swapaxes(1, 2)[:, None, ::2]


@each_place
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_packed_rows_are_those_of_pack(place, data):
    """Of any widths, types and strides; so are those of the reference."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kv_format, dtype = data.draw(st.sampled_from(list(PACKED))), data.draw(st.sampled_from(FLOATS))
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    rank, rope = data.draw(st.integers(1, 300)), data.draw(st.sampled_from([None, 1, 16, 77]))
    at, is_held = data.draw(st.integers(0, CAPACITY - length)), data.draw(st.booleans())
    values = wide(rng, batch, length, rank, dtype)
    other = dtype if data.draw(st.booleans()) else data.draw(st.sampled_from(FLOATS))
    ropes = None if rope is None else wide(rng, batch, length, rope, other)
    old = rows(rng, batch, CAPACITY, row_bytes(kv_format, rank, rope or 0), PACKED[kv_format])
    mx.eval(values, ropes, old)

    def run(reference=False):
        buffer = old + mx.zeros_like(old)
        mx.eval(buffer)
        held = copy.copy(buffer) if is_held else None
        found = ops.append_packed(buffer, values, ropes, at, reference=reference)
        made = [mx.contiguous(found), mx.contiguous(buffer[:, 0, : at + length])]
        mx.eval(made)
        del held
        return made

    new = pack(values, ropes, kv_format)[:, 0]
    expected = mx.concatenate([old[:, 0, :at], new], axis=1)
    with place():
        found = run()
    for array in (*found, *run(reference=True)):
        assert np.array_equal(words_of(array), words_of(expected))


@pytest.mark.parametrize("kv_format", PACKED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@each_place
def test_what_shares_a_scale_with_no_number_is_none(place, kv_format, value):
    values = np.ones((1, 1, 2, 200), np.float32)
    values[..., 1, 50] = value
    ropes = np.full((1, 1, 2, 3), value, np.float32)
    shape = (1, 1, 4, row_bytes(kv_format, 200, 3))
    expected = np.ones((1, 2, 200), bool)
    expected[:, 1, : 128 if kv_format == "fp8" else 200] = False
    with place():
        buffer = mx.zeros(shape, PACKED[kv_format])
        found = ops.append_packed(buffer, mx.array(values), mx.array(ropes), 0)
        mx.eval(found)
    read, rope = (to_numpy(part.astype(mx.float32)) for part in unpack(mx.contiguous(found), 200))
    assert np.array_equal(np.isfinite(read), expected)
    assert np.array_equal(rope, ropes[0], equal_nan=True)


@each_place
@pytest.mark.parametrize("kv_format", PACKED)
def test_packed_rows_are_appended_where_they_are(kv_format, place):
    """No byte of the cache is copied, whoever holds it; a fork copies once."""
    buffer = mx.zeros((1, 1, 1 << 15, row_bytes(kv_format, 512, 64)), PACKED[kv_format])
    values, ropes = mx.ones((1, 1, 1, 512), mx.bfloat16), mx.ones((1, 1, 1, 64), mx.bfloat16)
    mx.eval(values, ropes)

    def copied(buffer, at):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.async_eval(ops.append_packed(buffer, values, ropes, at))
        mx.eval(buffer)
        return mx.get_peak_memory() - before >= buffer.nbytes / 100

    with place():
        ops.append_packed(buffer, values, ropes, 0)
        mx.eval(buffer)
        fork = copy.copy(buffer)
        found = [copied(*step) for step in ((buffer, 1), (fork, 1), (fork, 2), (buffer, 2))]
    assert found == [False, True, False, False]


def test_gradients_of_packed_rows_are_refused():
    def loss(values):
        buffer = mx.zeros((1, 1, 4, 9), mx.int8)
        return ops.append_packed(buffer, values, None, 0).astype(mx.float32).sum()

    with pytest.raises(ValueError, match="packed rows have no gradient; leave kv_format at auto"):
        mx.eval(mx.grad(loss)(mx.ones((1, 1, 1, 5))))


@pytest.mark.parametrize(
    ("buffer", "values", "ropes", "at", "message"),
    [
        ((8, 9), (1, 1, 2, 5), None, 0, "buffer must be [batch, 1, capacity, width] but has shape"),
        ((1, 1, 8, 9), (2, 5), None, 0, "values must have shape (1,1,1,1) but has (2,5)"),
        ((1, 1, 8, 9), (2, 1, 2, 5), None, 0, "values must have shape (1,1,2,5) but has (2,1,2,5)"),
        ((1, 1, 8, 9), (1, 1, 2, 5), (1, 1, 1, 2), 0, "ropes must have shape (1,1,2,2)"),
        ((1, 1, 8, 9), (1, 1, 2, 5), (1, 1, 2, 2), 0, "buffer must have rows of 13 bytes, for 5"),
        ((1, 1, 8, 4), (1, 1, 2, 0), None, 0, "buffer must have rows of 4 bytes, for 0 values"),
        ((1, 1, 8, 9), (1, 1, 2, 5), None, 7, "at must be from 0 to 6, for 2 rows"),
        ((1, 1, 8, 9), (1, 1, 2, 5), None, 2**40, "at must fit 32 bits"),
    ],
)
def test_errors_of_packed_rows(buffer, values, ropes, at, message):
    arrays = mx.zeros(values), None if ropes is None else mx.zeros(ropes)
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.append_packed(mx.zeros(buffer, mx.int8), *arrays, at)
    with pytest.raises(ValueError, match=r"buffer must be uint8 .* but is float32"):
        ops.append_packed(mx.zeros((1, 1, 8, 9)), mx.zeros((1, 1, 2, 5)), None, 0)
    with pytest.raises(ValueError, match="values must be float32, float16 or bfloat16 but is"):
        ops.append_packed(mx.zeros((1, 1, 8, 9), mx.int8), mx.zeros((1, 1, 2, 5), mx.int8), None, 0)


def test_gradients_of_a_pair():
    def loss(rows, others, append):
        buffers = mx.zeros((1, 1, 6, 3)), mx.zeros((1, 1, 6, 2))
        a, b = append(buffers[0], rows, buffers[1], others, 2)
        return (a * mx.arange(12.0).reshape(1, 4, 3)).sum() + (b * b).sum()

    def two(buffer, rows, other, others, at):
        return ops.append_rows(buffer, rows, at), ops.append_rows(other, others, at)

    given = mx.ones((1, 1, 2, 3)), mx.full((1, 1, 2, 2), 3.0)
    expected = mx.grad(loss, (0, 1))(*given, two)
    with metal():
        found = mx.grad(loss, (0, 1))(*given, ops.append_pair)
        mx.eval(found)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(to_numpy(a), to_numpy(b))
        assert to_numpy(b).any()


def test_errors_of_a_pair():
    buffer, new = mx.zeros((1, 1, 8, 3)), mx.zeros((1, 1, 2, 3))
    for message, other in (
        ("other_rows must have shape (1,1,2,3) but has (1,1,1,3)", new[:, :, :1]),
        ("other_rows must be float32 but are float16", new.astype(mx.float16)),
    ):
        with metal(), pytest.raises(ValueError, match=re.escape(message)):
            ops.append_pair(buffer, new, buffer.astype(other.dtype), other, 0)


def test_a_reference_is_mlx():
    for reference in (False, True):
        buffer = mx.zeros((2, 1, 8, 3))
        found = ops.append_rows(buffer, mx.ones((2, 1, 2, 3)), 1, reference=reference)
        assert found[1, :, 2].tolist() == [0, 1, 1]
        assert buffer[0, 0, :3, 0].tolist() == [0, 1, 1]


def test_gradients():
    def loss(buffer, new):
        buffer = copy.copy(buffer)
        first = ops.append_rows(buffer, new, 2)
        return (first * mx.arange(12.0).reshape(1, 4, 3)).sum() + 2 * buffer.sum()

    found = mx.grad(loss, argnums=(0, 1))(mx.ones((1, 1, 6, 3)), mx.ones((1, 1, 2, 3)))
    expected = np.full((6, 3), 2.0, np.float32)
    expected[:4] += np.arange(12).reshape(4, 3)
    rows_only = expected[2:4].copy()
    expected[2:4] = 0
    assert np.array_equal(to_numpy(found[0])[0, 0], expected)
    assert np.array_equal(to_numpy(found[1])[0, 0], rows_only)


@pytest.mark.parametrize(
    ("shape", "new", "at", "message"),
    [
        ((1, 8, 3), (1, 1, 2, 3), 0, "buffer must be [batch, 1, capacity, width] but has shape"),
        ((1, 2, 8, 3), (1, 1, 2, 3), 0, "buffer must be [batch, 1, capacity, width]"),
        ((1, 1, 8, 3), (1, 2, 3), 0, "rows must have shape (1,1,1,3) but has (1,2,3)"),
        ((1, 1, 8, 3), (2, 1, 2, 3), 0, "rows must have shape (1,1,2,3) but has (2,1,2,3)"),
        ((1, 1, 8, 3), (1, 1, 2, 3), 7, "at must be from 0 to 6, for 2 rows and a capacity of 8"),
        ((1, 1, 8, 3), (1, 1, 2, 3), -1, "but is -1"),
        ((1, 1, 8, 3), (1, 1, 2, 3), 2**40, "at must fit 32 bits"),
    ],
)
def test_errors(shape, new, at, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.append_rows(mx.zeros(shape), mx.zeros(new), at)
    with pytest.raises(ValueError, match="rows must be float32 but are"):
        ops.append_rows(mx.zeros((1, 1, 8, 3)), mx.zeros((1, 1, 2, 3), mx.float16), 0)


def test_the_simulator_finds_the_shader_clean():
    if metal_sim.unavailable():
        pytest.skip(metal_sim.unavailable())
    buffer = empty(2, 40, mx.bfloat16)
    with metal():
        mx.eval(ops.append_rows(buffer, mx.ones((2, 1, 3, 40), mx.bfloat16), 5))
        launches = metal_sim.take_launches()
    assert [launch.report.clean for launch in launches] == [True]


@pytest.mark.parametrize("kv_format", PACKED)
def test_the_simulator_finds_packing_clean(kv_format):
    if metal_sim.unavailable():
        pytest.skip(metal_sim.unavailable())
    buffer = empty(2, row_bytes(kv_format, 150, 7), PACKED[kv_format])
    values, ropes = mx.ones((2, 1, 3, 150), mx.bfloat16), mx.ones((2, 1, 3, 7), mx.bfloat16)
    mx.eval(values, ropes)
    with metal(trace=True):
        mx.eval(ops.append_packed(buffer, values, ropes, 5))
        launches = metal_sim.take_launches()
    assert [launch.report.clean for launch in launches] == [True]
