"""Every barrier, bound and mask of the shaders is needed: without one, tracer or result tell.
Changes that no run can show are listed with the reason."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
from expert_layers import Case, make_layer, run_cpu, to_numpy
from metal_backend import metal
from metal_mutants import Mutants, Mutation

DENSE, AFFINE4, AFFINE3 = ("dense", 0, 0), ("affine", 4, 32), ("affine", 3, 32)
MXFP4, MXFP8, NVFP4_GLOBAL = ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4-global", 4, 16)
FP8 = ("fp8", 8, 128)
Q4_K, IQ3_XXS = ("q4_k", 4, 256), ("iq3_xxs", 3, 256)


@dataclass(frozen=True)
class Experts:
    """A named layer of experts, and the slots chosen in it where they matter."""

    name: str
    shape: Case
    slots: tuple[tuple[int, ...], ...] | None = None

    @property
    def tiles(self):
        return self.shape.tiles

    @functools.cache  # noqa: B019
    def layer(self):
        slots = None if self.slots is None else np.array(self.slots, np.int32)
        return make_layer(self.shape, pad=False, slots=slots)

    def run(self):
        return self.layer().moe()


def experts(name, *formats, slots=None, **sizes):
    return Experts(name, Case("float32", *formats, **sizes), slots)


# Slot 1 has a whole group and one pair more, slot 0 a group that is not whole.
SHARED = experts(
    "shared", AFFINE4, AFFINE4, DENSE, tokens=4, hidden=288, intermediate=45, used=2,
    simdgroups=(2, 2), slots=((1, 1), (0, 1), (1, 0), (1, 0)),
)  # fmt: skip
# Its numbers of rows and columns are odd.
ODD = experts(
    "odd", DENSE, DENSE, AFFINE4, tokens=2, hidden=77, intermediate=64, used=2, simdgroups=(2, 2)
)
# Rows of a block and three lanes more, the last of which has one value; a tile that is not whole.
TAIL = experts(
    "tail", DENSE, DENSE, DENSE, tokens=2, hidden=137, intermediate=5, used=2, simdgroups=(2, 2)
)
# It is in MLX's fast order, with more simdgroups than rows need, and one token.
FAST = experts(
    "fast", AFFINE4, AFFINE4, DENSE, top_k=1, hidden=1024, intermediate=8, used=1, rows=2,
    simdgroups=(5, 2),
)  # fmt: skip
MIXED = experts(
    "mixed", AFFINE3, MXFP8, MXFP4, top_k=1, hidden=288, intermediate=32, used=1, simdgroups=(1, 1)
)
# Its slots have 9, 5, 3, 2 and 13 pairs.
WIDE = experts(
    "wide", DENSE, DENSE, DENSE, tokens=16, hidden=9, intermediate=3, used=5, rows=1,
    simdgroups=(1, 2),
    slots=tuple(map(tuple, np.repeat(np.arange(5), [9, 5, 3, 2, 13]).reshape(16, 2).tolist())),
)  # fmt: skip
WHOLE = experts(
    "whole", AFFINE4, AFFINE4, DENSE, top_k=1, hidden=256, intermediate=3, used=1, rows=1,
    simdgroups=(1, 1),
)  # fmt: skip
FACTORS = experts(
    "factors", NVFP4_GLOBAL, NVFP4_GLOBAL, DENSE, tokens=2, hidden=288, intermediate=9, used=2,
    simdgroups=(1, 2), slots=((1, 0), (0, 1)),
)  # fmt: skip
# Rows of two squares; slots that end within one.
SQUARES = experts(
    "squares", FP8, FP8, DENSE, tokens=2, hidden=384, intermediate=133, used=2, rows=2,
    simdgroups=(2, 1), slots=((1, 0), (0, 1)),
)  # fmt: skip
# A row of one and a half blocks of 32 lanes; its sums are added with biases, and without.
BLOCKS = experts(
    "blocks", Q4_K, IQ3_XXS, DENSE, tokens=1, top_k=1, hidden=768, intermediate=3, used=1, rows=1,
    simdgroups=(1, 1),
)  # fmt: skip
# Slots before the first and after the last.
BAD = experts(
    "bad", DENSE, DENSE, DENSE, tokens=2, hidden=9, intermediate=3, used=2, rows=2,
    simdgroups=(1, 2), slots=((-1, 1), (-1, 2)),
)  # fmt: skip
# More rows than a lane holds two blocks of.
LONG = experts(
    "long", AFFINE4, AFFINE4, DENSE, top_k=1, hidden=576, intermediate=9, used=1, rows=8,
    simdgroups=(1, 1),
)  # fmt: skip
CASES = [SHARED, ODD, TAIL, FAST, MIXED, WIDE, WHOLE, FACTORS, SQUARES, BLOCKS, BAD, LONG]

# Each has a name, a case and a change, whose text has @old@new@ where it differs. Where the text
# occurs several times, a number follows that tells which.
BARRIER = "@  threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
GATE_UP = [
    # sharing.h and find_links
    ("barrier after links", SHARED, BARRIER, 0),
    ("links", SHARED, "p < pairs@@ + 1@; p +="),
    ("links, one less", SHARED, "p < pairs@@ - 1@; p +="),
    ("lone pairs lead", FAST, "group.count = @1@0@;"),
    ("earlier pairs", SHARED, "q < pair@@ + 1@; q++"),
    ("earlier pairs, one less", SHARED, "q < pair@@ - 1@; q++"),
    ("later pairs", SHARED, "q > pair@@ - 1@; q--"),
    ("later pairs, one less", SHARED, "q > pair@@ + 1@; q--"),
    ("last pair", SHARED, "int q = pairs@ - 1@@;"),
    ("last pair, one less", SHARED, "int q = pairs - @1@2@;"),
    ("groups after the first", SHARED, "earlier@ % most@@ == 0"),
    ("leaders", SHARED, "group.count = @links[pair] % 2@1@;"),
    ("members", SHARED, "i < most@@ + 1@; i++"),
    ("members, one less", SHARED, "i < most@@ - 1@; i++"),
    ("members of leaders", SHARED, "@group.count > 0 && @@next < pairs"),
    ("no next member", SHARED, "next < pairs@@ + 1@;"),
    ("member mask", SHARED, "= @member ? next : pair@next@;"),
    ("next link mask", SHARED, "@member ? links[next] / 2 : pairs@links[next] / 2@"),
    # dot_rows.h
    ("row of the slot", SHARED, "* n * F::row_bytes(k)@ + F::column_bytes(column)@@"),
    ("scale of the lane", SHARED, "F::row_scales(k)@ + F::column_scales(column)@@"),
    ("bias of the lane", SHARED, "biases + (F::factors ? slot * sizeof(float) : @scale@0@)"),
    ("row of the tile", SHARED, "weight + @rows * F::row_bytes(k) + @@F::column_bytes(columns)"),
    ("block of the row", SHARED, "row_bytes(k)@ + F::column_bytes(columns)@@"),
    ("scale of the block", SHARED, "F::row_scales(k)@ + F::column_scales(columns)@@"),
    ("squares of a slot", SQUARES, "(n@ + F::scale_rows - 1@@) / F::scale_rows"),
    ("square of the tile", SQUARES, "rows@ / F::scale_rows@@ * F::row_scales(k)"),
    ("square of the tile, none", SQUARES, "@rows@0@ / F::scale_rows * F::row_scales"),
    ("square of the column", SQUARES, "column / @group_size@(2 * group_size)@", 2),
    ("code", SQUARES, "fma(x_thread[i], mlx_fp::Dequantize<8>{}(cells.w[@i@0@])"),
    ("scale of the square", SQUARES, "result = fma(@cells.scale@1.0f@, accum"),
    # formats/gguf.h and what it includes
    ("lane of the block", BLOCKS, "column % Block::columns / @values@(2 * values)@"),
    ("bytes of a row", BLOCKS, "k / Block::columns * @Block::bytes@(Block::bytes - 1)@"),
    ("block of the column", BLOCKS, "column / Block::columns * @Block::bytes@0@"),
    ("sum of the bias", BLOCKS, "offset = glm_fused::product(@sum@0.0f@, cells.bias)"),
    ("scale of the lane's sum", BLOCKS, "result += fma(accum, @cells.scale@1.0f@, offset)"),
    ("scale without a bias", BLOCKS, "result = fma(accum, @cells.scale@1.0f@, result)"),
    ("six bits of a scale", BLOCKS, "@(block[8 + g] & 15)@0@ | (block[g] >> 2 & 48)"),
    ("six bits of a minimum", BLOCKS, "block[8 + g] >> 4 | (block[4 + g] >> 2 & @48@0@)"),
    ("the eighth sign", BLOCKS, "return seven@ | ((odd ^ odd >> 1) & 1) << 7@@;"),
    ("row of the codebook", BLOCKS, "kIq3XxsGrid[block[2 + 4 * lane@ + j@@]]"),
    ("bias of the block", SHARED, "biases + (F::factors ? 0 : @scale@0@)"),
    ("factor of the slot", FACTORS, "F::factors ? @slot@0@ * sizeof(float)"),
    ("factor of the block", FACTORS, "F::factors ? @0@scale@ : scale"),
    ("factor", FACTORS, "factors ? @sum * *(const device float*)factor@sum@ : sum"),
    ("sums zeroed", SHARED, "width@@ + 1@; i++) {\n    result[i] = 0"),
    ("sums zeroed, one less", SHARED, "width@@ - 1@; i++) {\n    result[i] = 0"),
    ("blocks", SHARED, "column < end@@ + F::block@; column"),
    ("blocks, one less", FAST, "column < end@@ - F::block@; column"),
    ("first block", FAST, "used, own, @0@F::block@, end, next"),
    ("next block", FAST, "own, column@ + F::block@@, end, next"),
    ("next block of the last", SHARED, "if ((@whole || at < end@true@) && (F"),
    ("cells of the next block", FAST, "i < count@@ - 1@; i++) {\n        cells"),
    ("cell of the next block", FAST, "cells[i] = next[@i@0@];"),
    ("blocks at once", LONG, "F::block <= end@@ + F::block@;"),
    ("blocks at once, one less", LONG, "F::block <@=@@ end;"),
    ("rows read", FAST, "i < depth * all@@ + 1@; i++"),
    ("rows read, one less", SHARED, "i < depth * all@@ - 1@; i++"),
    ("rows read mask", SHARED, "&& (@F::whole_tiles || i % rows < used@true@)"),
    ("rows read mask, one more", SHARED, "whole_tiles || i % rows < used@@ + 1@", 0),
    ("vectors", SHARED, "m < width@@ + 1@ && (whole"),
    ("vectors, one less", SHARED, "m < width@@ - 1@ && (whole"),
    ("vector of the block", FAST, "load<F>(m, @at + @@own,"),
    ("vector of the lane", SHARED, "load<F>(m, at@ + own@@,"),
    ("column of a vector", FAST, "load_x(x + offsets[m]@ + column@@"),
    ("vector of a choice", SHARED, "load_x(x@ + offsets[m]@@ + column"),
    ("rows multiplied", SHARED, "i < all@@ + 1@; i++"),
    ("rows multiplied, one less", SHARED, "i < all@@ - 1@; i++"),
    ("tail", ODD, "k - end - own@@ + 1@"),
    ("tail, one less", ODD, "k - end - own@@ - 1@"),
    ("tail of a lane", ODD, "left = @min(k - end - own, F::values)@k - end@"),
    ("tail lanes, one less", ODD, "left > @0@1@; i++"),
    ("tail rows", ODD, "rows@@ + 1@ && left > 0"),
    ("tail rows, one less", ODD, "rows@@ - 1@ && left > 0"),
    ("tail rows mask", TAIL, "if (@i % rows < used@true@) {\n        thread"),
    ("tail rows mask, one more", TAIL, "if (i % rows < used@@ + 1@) {\n        thread"),
    ("tail vectors", ODD, "m < width@@ + 1@; m++) {\n          const"),
    ("tail vectors, one less", ODD, "m < width@@ - 1@; m++) {\n          const"),
    ("vector of the tail", TAIL, "load_safe<F>(m, @end + @@own"),
    ("vector of the tail's lane", ODD, "load_safe<F>(m, end@ + own@@"),
    ("column of a tail", ODD, "load_x_safe(x + offsets[m]@ + column@@"),
    ("vector of a tail", ODD, "load_x_safe(x@ + offsets[m]@@ + column"),
    ("whole lanes of a tail", SHARED, "if (end + own < k@@ + F::values@) {"),
    ("whole lanes of a tail, one less", SHARED, "if (end + own < k@@ - F::values@) {"),
    ("weights of whole lanes", SHARED, "used, own, @end@0@, k, tail"),
    ("vector of whole lanes", SHARED, "x, own, @end@0@, k, result"),
    ("sums reduced", SHARED, "width@@ + 1@; i++) {\n    result[i] = F::"),
    ("sums reduced, one less", SHARED, "width@@ - 1@; i++) {\n    result[i] = F::"),
    ("sums of the second format", MIXED, "lane, result@ + rows * width@@"),
    # formats/
    ("whole blocks", SHARED, "fast ? k / block : @(k - 1)@(k + block)@ / block", 0),
    ("whole blocks, fast", FAST, "fast ? k / block@@ + 1@", 0),
    ("bytes of a row", SHARED, "k / 8 * bits@@ + 4@", 0),
    ("scales of a row", SHARED, "k / group_size@@ + 1@", 0),
    ("bytes of a lane", SHARED, "column / values * bytes@@ + 4@", 0),
    ("group of a lane", SHARED, "column / @@2 / @group_size", 0),
    ("packs of a lane", FAST, "fast && bits > @2@8@ ? 2 : 1"),
    ("bytes of odd units", MIXED, "bytes % 2 == 0 ? 2 : @1@2@"),
    ("units", SHARED, "i < bytes / unit@@ + 1@;"),
    ("units, one less", SHARED, "i < bytes / unit@@ - 1@;"),
    ("cells, one less", SHARED, "j < cells_per_unit@@ - 1@;"),
    ("whole blocks, fp", MIXED, "fast ? k / block : @(k - 1)@(k + block)@ / block", 1),
    ("bytes of a row, fp", MIXED, "k / 8 * bits@@ + 4@", 1),
    ("scales of a row, fp", MIXED, "k / group_size@@ + 1@", 1),
    ("bytes of a lane, fp", MIXED, "column / values * bytes@@ + 4@", 1),
    ("group of a lane, fp", MIXED, "column / @@2 / @group_size", 1),
    ("blocks of dense", ODD, "k / block@@ + 1@;\n", 0),
    ("blocks of squares", SQUARES, "k / block@@ - 1@;\n", 1),
    ("dense row", ODD, "k@@ / 2@ * int(sizeof(W))"),
    ("dense column", ODD, "column@@ / 2@ * int(sizeof(W))"),
    ("dense weight mask", ODD, "@i < used ? from[i] : W(0)@from[i]@"),
    ("dense weight mask, one more", ODD, "i < used@@ + 1@ ? from"),
    ("dense weight mask, one less", ODD, "i < used@@ - 1@ ? from"),
    ("dense vector mask", ODD, "@i < used ? static_cast<float>(x[i]) : 0.0f@x[i]@"),
    ("dense vector mask, one more", ODD, "i < used@@ + 1@ ? static_cast"),
    ("dense vector mask, one less", ODD, "i < used@@ - 1@ ? static_cast"),
    ("dense tail weights", ODD, "i < values@@ - 1@; i++) {\n      cells.w[i] = i <"),
    ("dense tail vector", ODD, "i < values@@ - 1@; i++) {\n      x_thread[i] = i <"),
    ("dense products", ODD, "i < values@@ + 1@; i++) {\n      result +="),
    ("dense products, one less", ODD, "i < values@@ - 1@; i++) {\n      result +="),
    ("dense sum, first step", ODD, "lanes = kLanes / @2@4@;"),
    ("dense sum, last step", ODD, "lanes >@=@@ 1;"),
    # GateUp and its kernel
    ("offsets", SHARED, "m < width@@ + 1@; m++) {\n      offsets[m] = members[m] /"),
    ("offsets, one less", SHARED, "m < width@@ - 1@; m++) {\n      offsets[m] = members[m] /"),
    ("steps", SHARED, "r < rows@@ + 1@; r += step", 0),
    ("steps, one less", SHARED, "r@@ + step@ < rows; r += step", 0),
    ("rows left", SHARED, "used = intermediate - row@@ + 1@;"),
    ("rows left, one less", SHARED, "used = intermediate - row@@ - 1@;"),
    ("no rows left", FAST, "if (used <@=@@ 0) {", 0),
    ("results", SHARED, "i < step * width@@ + 1@; i++", 0),
    ("results, one less", SHARED, "i < step * width@@ - 1@; i++", 0),
    ("one lane", SHARED, "@lane == 0 && @@i / width"),
    ("rows mask", SHARED, "@i / width < used && @@"),
    ("rows mask, one more", SHARED, "i / width < used@@ + 1@ &&"),
    ("results of up", SHARED, "result[@step * width + @@i]"),
    ("groups", SHARED, "@group.count == 0 || @@slot < 0"),
    ("slots from the first", BAD, "group.count == 0 || @slot < 0 || @@slot"),
    ("slots to the last", BAD, "slot >= params.bank@@ + 1@) {\n    return"),
    ("more than 8", WIDE, "count > @8@9@) {", 0),
    ("more than 4", WIDE, "count > @4@5@) {", 0),
    ("more than 2", WIDE, "count > @2@3@) {", 0),
    ("more than 1", WIDE, "count > @1@2@) {", 0),
]
DOWN_SUM = [
    ("barrier after links", SHARED, BARRIER, 0),
    ("barrier after terms", SHARED, BARRIER, 1),
    ("offsets", SHARED, "m < width@@ + 1@; m++) {\n      offsets[m] = members[m] *"),
    ("offsets, one less", SHARED, "m < width@@ - 1@; m++) {\n      offsets[m] = members[m] *"),
    ("steps", SHARED, "r < rows@@ + 1@; r += step", 1),
    ("steps, one less", SHARED, "r@@ + step@ < rows; r += step", 1),
    ("rows left", ODD, "used = hidden - row@@ + 1@;"),
    ("rows left, one less", ODD, "used = hidden - row@@ - 1@;"),
    ("terms", SHARED, "i < step * width@@ + 1@; i++", 1),
    ("terms, one less", SHARED, "i < step * width@@ - 1@; i++", 1),
    ("one lane", SHARED, "@lane == 0 && @@i % width"),
    ("pairs", SHARED, "pair < pairs@@ + 1@; pair +="),
    ("pairs, one less", BAD, "pair < pairs@@ - 1@; pair +="),
    ("groups", SHARED, "if (count @==@<@ 0) {"),
    ("slots from the first", BAD, "if (@slot < 0 || @@slot >= params.bank) {\n      GLM_UNROLL"),
    ("slots to the last", BAD, "slot >= params.bank@@ + 1@) {\n      GLM_UNROLL"),
    ("terms without a slot", BAD, "if (int(simd_lid) < rows@@ + 1@)"),
    ("terms without a slot, one less", BAD, "if (int(simd_lid) < rows@@ - 1@)"),
    ("pairs without a slot", BAD, "m < most@@ - 1@; m++"),
    ("more than 8", WIDE, "count > @8@9@) {", 1),
    ("more than 4", WIDE, "count > @4@5@) {", 1),
    ("more than 2", WIDE, "count > @2@3@) {", 1),
    ("more than 1", WIDE, "count > @1@2@) {", 1),
    ("rows summed", ODD, "used = @min(rows, params.hidden - row)@rows@;"),
    ("rows summed of a tile", ODD, "used = @min(rows, params.hidden - row)@params.hidden - row@;"),
    ("tokens", SHARED, "i < params.tokens * used@@ + 1@;"),
    ("tokens, one less", SHARED, "i < params.tokens * used@@ - 1@;"),
    ("choices", SHARED, "choice < params.top_k@@ + 1@;"),
    ("choices, one less", SHARED, "choice < params.top_k@@ - 1@;"),
    ("scales of a row, fp", MIXED, "k / group_size@@ + 1@", 1),
]
# No run can show these, because the changed shader is as right; the reason is told.
EQUIVALENT = [
    # Fewer rows at once, in more steps, give the same sums.
    ("rows at once", SHARED, "rows * width <= kMaxResults@@ / 4@"),
    # The mask saves the products of rows past the last, which nothing stores.
    ("rows multiplied mask", SHARED, "if (@F::whole_tiles || i % rows < used@true@"),
    # Members past the count repeat the leader: its result is stored twice.
    ("members stored", SHARED, "i / width < used@ && i % width < count@@"),
    # A wider run of the same members gives the same sums.
    ("two by four", WIDE, "count > @2@1@) {", 0),
    # A lane without values adds zeros.
    ("tail lanes", ODD, "left >@@=@ 0; i++"),
    # One cell more is where the scale comes to lie afterwards.
    ("cells", SHARED, "j < cells_per_unit@@ + 1@;"),
    # MLX's safe functions add in the same order as the others.
    ("last block", WHOLE, "fast ? k / block : @(k - 1)@k@ / block", 0),
]

MUTATIONS = [
    Mutation(name, case, kernel, *change)
    for kernel, table in (("moe_gate_up", GATE_UP), ("moe_down_sum", DOWN_SUM))
    for name, case, *change in table
]
SAME = [Mutation(name, case, "moe_gate_up", *change) for name, case, *change in EQUIVALENT]
moe = Mutants(MUTATIONS, SAME)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shader_itself_is_clean(case):
    launches = moe.right(case).launches
    assert all(launch.report.clean for launch in launches), launches
    with metal(tiles=case.tiles):
        y = to_numpy(case.run())
    # The CPU refuses slots that do not exist; the shader answers NaN.
    expected = np.full_like(y, np.nan) if case is BAD else run_cpu(case.layer())
    np.testing.assert_array_equal(y, expected)
    assert launches[1].outputs[6] == y.tobytes()


@pytest.mark.parametrize("mutation", moe.params(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation):
    assert moe.caught_by(mutation)


@pytest.mark.parametrize("mutation", moe.params(SAME), ids=str)
def test_equivalent_change_gives_the_same(mutation):
    assert not moe.caught_by(mutation)
