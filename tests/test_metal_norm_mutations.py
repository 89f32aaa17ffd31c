"""Every bound, stride and rounding is needed of the shaders that take arrays of any strides."""

import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import DTYPES
from metal_backend import cpu
from metal_mutants import Mutants, Mutation

from glm_fused import ops
from glm_fused.formats.kv_rows import PACKED, row_bytes

COLUMNS = 201  # a whole block, then 18 whole lanes and a lane with one column


@dataclass(frozen=True)
class Norm:
    """A norm of [2, 3, 2, n] with unlike strides on every axis."""

    op: str
    dtype: str = "float32"
    tiles = None

    @functools.cache  # noqa: B019
    def inputs(self):
        rng = np.random.default_rng(1)
        x = mx.array(rng.standard_normal((3, 2, 2, 2 * COLUMNS), dtype=np.float32) * 0.01 + 0.01)
        others = mx.array(rng.standard_normal((2, COLUMNS), dtype=np.float32))
        x = mx.contiguous(x.astype(DTYPES[self.dtype])).swapaxes(0, 1)[..., ::2]
        return [x, *others[: 1 if self.op == "rms_norm" else 2]]

    def run(self):
        return getattr(ops, self.op)(*self.inputs(), 1e-5)


@dataclass(frozen=True)
class Rotation:
    """A rotation of [2, 3, 2, 9] by four pairs, with unlike strides on every axis."""

    interleaved: bool = True
    tiles = None

    @functools.cache  # noqa: B019
    def inputs(self):
        rng = np.random.default_rng(2)
        x = mx.array(rng.standard_normal((3, 2, 2, 18), dtype=np.float32)).swapaxes(0, 1)[..., ::2]
        cos = mx.array(rng.standard_normal((2, 1, 2, 8), dtype=np.float32))[..., ::2]
        sin = mx.array(rng.standard_normal((2, 2, 1, 12), dtype=np.float32)).swapaxes(1, 2)
        return [x, cos, sin[..., ::3]]

    def run(self):
        return ops.rotate(*self.inputs(), self.interleaved)


@dataclass(frozen=True)
class Appending:
    """Rows [3, 1, 2, 10] of unlike strides, for a buffer whose rows are of another width."""

    tiles = None

    @functools.cache  # noqa: B019
    def inputs(self):
        rng = np.random.default_rng(3)
        draw = rng.standard_normal((3, 2, 20, 1), dtype=np.float32)
        return [mx.zeros((3, 1, 8, 10)), mx.array(draw).swapaxes(2, 3).swapaxes(1, 2)[..., ::2]]

    def run(self):
        buffer, rows = self.inputs()
        return ops.append_rows(mx.array(buffer), rows, 4)[:, 4:]


@dataclass(frozen=True)
class AppendingTwo(Appending):
    """The same rows, and others of them that are narrower."""

    def run(self):
        buffer, rows = self.inputs()
        others, other_rows = mx.zeros((3, 1, 9, 7)), rows[..., 2:9]
        both = ops.append_pair(mx.array(buffer), rows, others, other_rows, 4)
        return mx.concatenate([first[:, 4:] for first in both], axis=-1)


@dataclass(frozen=True)
class Packing:
    """Rows [3, 1, 2, 200] and RoPE values of unlike strides, one of zeros, for a packed cache."""

    kv_format: str
    dtype: str
    tiles = None

    @functools.cache  # noqa: B019
    def inputs(self):
        rng = np.random.default_rng(4)
        draw = rng.standard_normal((3, 2, 840, 1), dtype=np.float32) ** 3
        draw[:, :, 0] = -20
        draw[1, 1] = 0
        draw[0, 0, :4:2, 0] = 448, 19  # a scale of 1, and half way between two codes
        values = mx.array(draw).astype(DTYPES[self.dtype]).swapaxes(2, 3).swapaxes(1, 2)
        width = row_bytes(self.kv_format, 200, 9)
        return mx.zeros((3, 1, 8, width), PACKED[self.kv_format]), values

    def run(self):
        buffer, values = self.inputs()
        new = values[..., :400:2], values[..., 401:428:3]
        return ops.append_packed(buffer + mx.zeros_like(buffer), *new, 4)[:, 4:]


RMS, LAYER, HALF = Norm("rms_norm"), Norm("layer_norm"), Norm("rms_norm", "bfloat16")
HALF_LAYER = Norm("layer_norm", "bfloat16")
PAIRS, HALVES = Rotation(), Rotation(False)
ROWS, BOTH = Appending(), AppendingTwo()
FP8, INT8 = Packing("fp8", "bfloat16"), Packing("int8", "float32")

# Each has a name, the cases and a change, whose text has @old@new@ where it differs. Where the text
# occurs several times, a number follows that tells which: first sum_of, then squares_of; first
# rms_norm, then layer_norm.
VIEW = [
    ("position", "position = row % view.@length@heads@;"),
    ("head", "row / view.@length@heads@ % view.heads"),
    ("heads", "% view.@heads@length@;\n"),
    ("sequence", "row / view.length / view.@heads@length@;"),
    ("sequence's stride", "sequence * view.@sequence@head@_stride"),
    ("head's stride", "head * view.@head@sequence@_stride"),
    ("position's stride", "position * view.@position@head@_stride"),
]
SUMS = [
    ("first column of a lane", "first = lane * Order::values@@ + 1@;"),
    ("columns of a block", "first += Order::block@@ * 2@)"),
    ("columns", "first < n@@ - 1@; first"),
    ("columns of a lane", "min(first + Order::values@@ - 1@, n)"),
    ("columns of the last lane", "Order::values, n@@ - 1@)"),
    ("columns of the last lane, one more", "Order::values, n@@ + 1@)"),
    ("sum of every lane", "return @simd_broadcast(Order::reduce(sum), 0)@Order::reduce(sum)@;"),
    ("sum of the first lane", "Order::reduce(sum), @0@1@)"),
]
SQUARES = [
    ("stride of the squares", "(x[i@ * stride@@]) - mean;"),
    ("square", "multiply_add(centered, @centered@1.0f@, sum)"),
]
OUTPUT = [
    ("row of x", "row_offset(params.x, @row@0@)"),
    ("row of y", "y += @size_t(row) * n@0@;"),
    ("epsilon", "n, @params.eps@0.0f@)"),
    ("column of a lane", "int i = @lane@0@; i < n;"),
    ("columns of y", "i < n@@ - 1@; i += kLanes"),
    ("columns of y, one more", "i < n@@ + 1@; i += kLanes"),
    ("step of a lane", "i += kLanes@@ * 2@)"),
    ("weight", "static_cast<float>(weight[@i@0@])"),
]
MEAN = [
    ("count of squares", "squares / static_cast<float>(n@@ + 1@)"),
    ("epsilon's place", "square_root(mean@ + eps)@) + eps@"),
    ("root", "1.0f / @square_root@@(mean"),
    ("product with the weight", "product(round_to(x * inverse, type), @weight@1.0f@)"),
]
ROUNDING = ("rounding", "product(@round_to(x * inverse, type)@x * inverse@, weight)")
LAYERED = [
    ("mean's count", "sum_of(x, stride, n, lane) / static_cast<float>(n@@ - 1@)"),
    ("stride of the mean", "sum + static_cast<float>(x[i@ * stride@@]);"),
    ("mean of the squares", "(x[i * stride])@ - mean@@;\n      sum"),
    ("mean off x", "(x[i * stride])@ - mean@@,"),
    ("bias", "static_cast<float>(bias[@i@0@])"),
    ("sum with the bias", "type), type)@ + bias@@;"),
]
ROTATE = [
    ("pairs", "pairs = params.cosines.columns@@ - 1@;"),
    ("row of x", "row_offset(params.x, @row@0@)"),
    ("row of y", "y += @size_t(row) * params.x.columns@0@;"),
    ("columns that stay", "i >@=@@ pairs"),
    ("copied column", "y[pairs + i] = x[(pairs + i@@ - 1@)"),
    ("stride of a copy", "x[(pairs + i)@ * stride@@]"),
    ("stride of a", "x[first@ * stride@@]"),
    ("stride of b", "x[second@ * stride@@]"),
    ("heads of an angle", "row / length@ / params.x.heads@@ * length"),
    ("length of an angle", "params.x.heads@ * length@@ + row"),
    ("position of an angle", "* length@ + row % length@@;"),
    ("cosine's stride", "i@ * params.cosines.column_stride@@]"),
    ("sine's stride", "i@ * params.sines.column_stride@@]"),
    ("contracted difference", "@product(a, cosine) - product(b, sine)@a * cosine - b * sine@"),
    ("contracted sum", "@product(b, cosine) + product(a, sine)@b * cosine + a * sine@"),
    ("sign", "product(a, cosine) @-@+@ product"),
]
HALVED = [
    ("first of halves", "? 2 * i : i@@ + 1@;"),
    ("second of halves", "2 * i + 1 : @pairs + @1 + @i;"),
]
COPY = [
    ("row of the target", "row_offset(params.to, @row@0@)"),
    ("row of the source", "row_offset(params.from, @row@0@)"),
    ("stride of the target", "params.to, row) + column@ * params.to.column_stride@ * 2@]"),
    ("stride of the source", "params.from, row) + column@ * params.from.column_stride@@]"),
]
COPY_PAIR = [
    change
    for i, c in enumerate("ab")
    for change in (
        (f"whose rows, {c}", f"@at.z == {i} && @@column < {c}.from"),
        (f"columns, {c}", f"column < {c}.from.columns@@ - 1@)"),
        (f"row of the target, {c}", f"row_offset({c}.to, @row@0@)"),
        (f"row of the source, {c}", f"row_offset({c}.from, @row@0@)"),
        (f"stride of the target, {c}", f"{c}.to, row) + column@ * {c}.to.column_stride@ * 2@]"),
        (f"stride of the source, {c}", f"{c}.from, row) + column@ * {c}.from.column_stride@@]"),
    )
] + [("columns of the narrower", "column < @b@a@.from.columns) {\n    to_b")]
PACK = [
    ("row of the target", "to += row_offset(params.to, @row@0@)"),
    ("row of the values", "values += row_offset(params.values, @row@0@)"),
    ("row of RoPE values", "ropes += row_offset(params.ropes, @row@0@)"),
    ("place of RoPE values", "to += (rank + 4 * params.scales@@ - 1@) * stride"),
    ("columns of RoPE values", "i < params.ropes.columns@@ - 1@"),
    ("columns of RoPE values, one more", "i < params.ropes.columns@@ + 1@"),
    ("stride of RoPE values", "ropes[i@ * params.ropes.column_stride@@]"),
    ("bytes of RoPE values", "to + @2@1@ * i * stride"),
    ("first of a scale", "begin = part * params.tile@@ + 1@"),
    ("last of a scale", "min(begin + params.tile@@ - 1@, rank)"),
    ("rank", "params.tile, rank@@ - 1@)"),
    ("sign of the largest", "bits_of(value) & 0x@7@f@fffffffu"),
    ("largest of all lanes", "float_of(@simd_max(largest)@largest@)"),
    ("stride of values", "values[i@ * step@@]"),
    ("place of a scale", "to += (rank + 4 * part@@ + 1@) * stride"),
    ("bytes of a scale", "bits_of(scale), @4@3@)"),
    ("shift of a byte", "(8 * i@@ + 1@)"),
    ("stride of bytes", "to[i * stride@@ * 2@] = static_cast"),
    ("stride of codes", "to[i * stride@@ * 2@] = Packing"),
]
CODES = [
    (FP8, "rank, one more", "params.tile, rank@@ + 1@)"),
    (FP8, "tile", "params.tile@@ - 8@, end"),
    (FP8, "scale of zero", "scale == 0.0f ? @1.0f@scale@ : scale"),
    (FP8, "largest code", "return @448.0f@440.0f@;"),
    (FP8, "subnormals", "magnitude < (@121u@120u@ << 23)"),
    (FP8, "rounding to even", "0x7ffffu + @odd@0u@)"),
    (FP8, "rounding", "+ @0x7ffffu@0u@ + odd"),
    (FP8, "exponent", "magnitude - (@120u@119u@ << 23)"),
    (FP8, "sign", "found | @sign >> 24@0u@)"),
    (INT8, "largest code", "return @127.0f@126.0f@;"),
    (INT8, "rounding", "value + @12582912.0f@8388608.0f@"),
]
MUTATIONS = [
    *(Mutation(n, case, "pack_rows", c) for n, c in PACK for case in (FP8, INT8)),
    Mutation("stride of values, once more", FP8, "pack_rows", "values[i@ * step@@]", 1),
    *(Mutation(n, case, "pack_rows", c) for case, n, c in CODES),
    *(Mutation(n, BOTH, "copy_pair", c) for n, c in COPY_PAIR),
    *(Mutation(n, ROWS, "copy_rows", c) for n, c in COPY),
    *(Mutation(n, RMS, "rms_norm", c) for n, c in (*VIEW, *SQUARES, *OUTPUT, *MEAN)),
    *(Mutation(n, RMS, "rms_norm", c, 1) for n, c in SUMS),
    *(Mutation(n, LAYER, "layer_norm", c) for n, c in (*SUMS, *LAYERED)),
    *(Mutation(n, LAYER, "layer_norm", c, 1) for n, c in OUTPUT),
    Mutation(ROUNDING[0], HALF, "rms_norm", ROUNDING[1]),
    Mutation("rounding before the bias", HALF_LAYER, "layer_norm",
             "return @round_to(normed(x, inverse, weight, type), type)"
             "@normed(x, inverse, weight, type)@ + bias"),
    *(Mutation(n, PAIRS, "rotate_rows", c) for n, c in (*VIEW, *ROTATE)),
    Mutation("first of pairs", PAIRS, "rotate_rows", "? @2 * i@i@ : i;"),
    Mutation("second of pairs", PAIRS, "rotate_rows", "? 2 * i@ + 1@@ : pairs"),
    *(Mutation(n, HALVES, "rotate_rows", c) for n, c in HALVED),
]  # fmt: skip
mutants = Mutants(MUTATIONS)


@pytest.mark.parametrize("case", [RMS, LAYER, HALF, HALF_LAYER, PAIRS, HALVES], ids=str)
def test_the_shader_itself_is_clean(case):
    (launch,) = mutants.right(case).launches
    assert launch.report.clean, launch.report
    with cpu():
        y = case.run()
    assert list(launch.outputs.values()) == [bytes(memoryview(y.view(mx.uint8)))]


@pytest.mark.parametrize("changed", mutants.params(MUTATIONS), ids=str)
def test_mutation_is_caught(changed):
    assert mutants.caught_by(changed)
