"""Every barrier, bound and mask of a prompt's shaders is needed: without it, tracer or result tell.
Changes that no run can show are listed with the reason."""

import numpy as np
import pytest
from expert_layers import Case
from metal_mutants import Mutants, Mutation
from test_metal_mutations import Experts, experts
from test_metal_mutations_mla import Attention

DENSE, AFFINE4, MXFP4 = ("dense", 0, 0), ("affine", 4, 32), ("mxfp4", 4, 32)
NVFP4_GLOBAL, FP8 = ("nvfp4-global", 4, 16), ("fp8", 8, 128)


# Slots have 9, 1 and 30 pairs; rows end within a tile, and the last fours of a vector beyond it.
FEW = experts(
    "few", AFFINE4, MXFP4, DENSE, tokens=20, hidden=96, intermediate=45, used=3,
    slots=tuple(map(tuple, np.repeat([2, 1, 0], [30, 1, 9]).reshape(20, 2).tolist())),
)  # fmt: skip
# More pairs of a slot than are taken at once, and rows of several threadgroups.
MANY = experts(
    "many", DENSE, DENSE, DENSE, tokens=270, top_k=1, hidden=70, intermediate=36, used=2,
    slots=tuple((int(i > 9),) for i in range(270)),
)  # fmt: skip
FACTORS = experts(
    "factors", NVFP4_GLOBAL, FP8, NVFP4_GLOBAL, tokens=17, top_k=1, hidden=128, intermediate=32,
    used=2,
)  # fmt: skip
# What is not compensated, of more vectors than are taken at once.
HALVES = Experts("halves", Case("bfloat16", DENSE, DENSE, DENSE, 140, 1, 70, 36, 1), ((0,),) * 140)
# Slots before the first and after the last.
BAD = experts(
    "bad", DENSE, DENSE, DENSE, tokens=20, hidden=70, intermediate=4, used=2,
    slots=tuple([(-1, 1), (0, 7), (1, 0), (0, 1)] * 5),
)  # fmt: skip

# Two sequences with a start of their own; columns and RoPE end within a matrix.
KEYS = Attention("keys", 3, 25, 4, total=40, b=2, queries=17, start=(3, 0))
# Heads of two threadgroups, whose lists have keys that no query sees.
LISTS = Attention("lists", 17, 40, 8, total=120, listed=75, queries=17, gaps=True)
# Columns of two simdgroups.
WIDE_ROWS = Attention("wide rows", 1, 104, total=20, queries=17)
# Nothing is listed that a query sees.
NO_KEYS = Attention("no keys", 2, 8, listed=3, queries=17, empty=(0, 3))
CASES = [FEW, MANY, FACTORS, HALVES, BAD, KEYS, LISTS, WIDE_ROWS, NO_KEYS]

BARRIER = "@threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
GROUP_PAIRS = [
    ("barrier", FEW, BARRIER, 0),
    ("stretch", MANY, "each = (pairs@ + kSortSimdgroups - 1@@) /"),
    ("end of the pairs", MANY, "end = @min(first + each, pairs)@first + each@;"),
    ("slots from the first", BAD, "return @slot < 0 ? bank : @@min(slot, bank)"),
    ("slots to the last", BAD, "bank : @min(slot, bank)@slot@;"),
    ("earlier groups", FEW, "found <@@=@ group"),
    ("one lane", FEW, "@if (lane == 0) {@{@\n    before"),
    ("earlier simdgroups", FEW, "i <@@=@ simdgroup ? own"),
    ("one writer", FEW, "@simdgroup == 0 && @@lane == 0"),
    ("last pairs", FEW, "@pair + lane < end && @@group_of"),
    ("place of a lane", FEW, "place@ + simd_prefix_exclusive_sum(fits)@@"),
    ("pairs that fit", FEW, "if (@fits != 0@true@)"),
    ("place of the next", MANY, "place += @simd_sum(fits)@0@;"),
]
GATE_UP = [
    ("vectors loaded after the last are used", MANY, BARRIER, 1),
    ("vectors used after they are loaded", MANY, BARRIER, 2),
    ("vectors loaded", FEW, "left = @vector < count@true@ ? k - column"),
    ("offsets", MANY, "size_t(@vector < count ? places[vector] : 0@places[vector]@)"),
    ("eights of vectors", FEW, "whole = @(count + kSide - 1) / kSide * kSide@count@;"),
    ("end of a vector", MANY, "to[j] = @j < left@true@ ? from"),
    ("columns left", MANY, "vector < count ? k@@ + 1@ - column - at"),
    ("rows loaded", FEW, "left = @row < used@true@ ? k"),
    ("whole cells", MANY, "partial_lanes || left >= @F::values@1@) {"),
    ("cells beyond the last", MANY, "+ j) = @left > 0@true@"),
    ("gate or up", FEW, "rows + (@first + @@row) * kRowPitch"),
    ("columns of a row", FEW, "w.skip(row, column@ + at@@, k)"),
    ("row", FEW, "w.skip(@row@0@, column"),
    ("eights of a simdgroup", FEW, "eight * kGroupSimdgroups) * kSide < count@@ - kSide@"),
    ("eights that are not loaded", FEW, "if (@has(i)@true@)"),
    ("sums of a step", FEW, "kWide + wide + i % kWideStep, @part[i]@part[0]@);"),
    ("sums of steps", HALVES, "sums[at] @+@@= part;"),
    ("columns of a step", HALVES, "compensated ? 1 : kDeep@@ - 1@;"),
    ("what is lost", MANY, "more = part@ - lost[at]@@;"),
    ("loss of a step", MANY, "error = (sum[i] - sums[at][i])@ - more[i]@@;"),
    ("losses begun", MANY, "lost[i] = float2(@0.0f@1.0f@)"),
    ("parts", FEW, "part[i] = float2(@0.0f@1.0f@)"),
    ("neighbouring row", FEW, "float2(from[0], from[@kRowPitch@1@])"),
    ("neighbouring column", FEW, "static_cast<float>(from[@1@0@])"),
    ("eight columns of rows", FEW, "kSide * kRowPitch + d * @kSide@0@"),
    ("pairs of the slot", FEW, "row_of_x(@group.first + @@first + thread_id)"),
    ("pairs of a pass", MANY, "row_of_x(group.first +@ first +@@ thread_id)"),
    ("pairs' tokens", FEW, "order[place]@ / top_k@@;"),
    ("pairs of the group", FEW, "if (thread_id < count@@ + 99@) {\n      places"),
    ("passes", MANY, "count = @min(Tile::vectors, group.count - first)@Tile::vectors@;"),
    ("sums begun", MANY, "sums[i] = @float2(0.0f)@sums[i]@;"),
    ("columns", FEW, "column < k@@ - 32@; column"),
    ("rows left", FEW, "min(Job::most, n - row@@ + 1@)"),
    ("vectors stored", FEW, "if (@vector < count && @@at < job.used"),
    ("rows stored", FEW, "if (vector < count@ && at < job.used@@"),
    ("factor of gate", FACTORS, "@Gate::total(sums[0][i], gate.biases)@sums[0][i]@"),
    ("gate", FEW, "Gate::total(sums[@0@wide@][i]"),
    ("up", FEW, "Up::total(sums[@wide@0@][i]"),
    ("place of act", FEW, "act[size_t(place) * n + row@@ + 1@]"),
    ("row of act", FEW, "act@ + row@@,\n"),
    ("pair of act", MANY, "job.store(group.first +@ first +@@ vector"),
    ("eight stored", MANY, "own = sums.sums + @eight * kWide + @@block"),
    ("block stored", FEW, "own = sums.sums + eight * kWide@ + block@@;"),
    ("row stored", FEW, "at = @block * kSide + @@matrix_column(lane) + i % 2"),
]
DOWN = [
    ("vectors loaded after the last are used", MANY, BARRIER, 1),
    ("vectors used after they are loaded", MANY, BARRIER, 2),
    ("slots that are none", BAD, "i < group.count * used@@ - 1@;"),
    ("rows of slots that are none", BAD, "n + row@ + i % used@@] = static_cast<T>(NAN)"),
    ("pairs of slots that are none", BAD, "order[group.first@ + i / used@@]"),
    ("places of a pass", MANY, "row_of_x(group.first +@ first +@@ thread_id)"),
    ("places of the slot", FEW, "row_of_x(@group.first + @@first + thread_id)"),
    ("passes", MANY, "count = @min(Tile::vectors, group.count - first)@Tile::vectors@;"),
    ("sums begun", MANY, "sums[i] = @float2(0.0f)@sums[i]@;"),
    ("rows left", FEW, "min(kGroupRows, n - row@@ + 1@)"),
    ("vectors stored", FEW, "if (@vector < count && @@at < job.used"),
    ("rows stored", FEW, "if (vector < count@ && at < job.used@@"),
    ("factor", FACTORS, "@F::total(sums[0][i], w.biases)@sums[0][i]@"),
    ("pair of y", MANY, "job.store(group.first +@ first +@@ vector"),
    ("rows of a threadgroup", MANY, "y@ + row@@,\n      n,\n      used};"),
]
MLA = [
    ("barrier after the list", KEYS, BARRIER, 0),
    ("barrier after parts of scores", KEYS, BARRIER, 1),
    ("barrier after weights", KEYS, BARRIER, 2),
    ("barrier after totals", KEYS, BARRIER, 3),
    ("entry of a list", LISTS, "= @entry < params.listed@true@\n", 0),
    ("first visible key", KEYS, "key @>=@>@ visible.low &&"),
    ("last visible key", LISTS, "key >= visible.low@ && key < visible.high@@ ? key"),
    ("keys listed by one simdgroup", LISTS, "if (listed != 0@ && simdgroup == 0@@)"),
    ("heads", LISTS, "return @head < heads && @@column < end"),
    ("columns of queries", KEYS, "head < heads@ && column < end()@@\n"),
    ("columns dealt to a lane", KEYS, "row / 2 * kChunk +@@ 1 +@"),
    ("columns of a matrix", KEYS, "eight % kBlockEights * @2@1@ + row % 2"),
    ("neighbouring column", KEYS, "* 2 + @row % 2@0@\n"),
    ("second head", KEYS, "query(head@ + 1@@, column))"),
    ("own block", WIDE_ROWS, "simdgroup * kOwnColumns +@ block * kBlockColumns@ 0@;"),
    ("own columns", WIDE_ROWS, "return @simdgroup * kOwnColumns +@@ block"),
    ("lane's chunk", KEYS, "part.own_column(block)@ + place@@;"),
    ("keys that are none", KEYS, "if (@key >= 0 && @@column < part.rows.rank)"),
    ("chunks past the latents", WIDE_ROWS, "if (key >= 0@ && column < part.rows.rank@@)"),
    ("RoPE of no key", KEYS, "ropes[i] = @key >= 0 && @@column"),
    ("end of RoPE", KEYS, "ropes[i] = key >= 0@ && column + i < part.end()@@"),
    ("value of a matrix", KEYS, "value(at@ + 1@@)"),
    ("keys of the tile", LISTS, "first + i * kSide@ + matrix_row(lane)@@;"),
    ("keys after the last", LISTS, "at < count ? @list[at]@list[0]@ : -1", 0),
    ("keys before the last", LISTS, "at < count@@ - 1@ ? list", 0),
    ("latents' scores", WIDE_ROWS, "keys[eight].matrix(@d@0@), queries"),
    ("has a block", WIDE_ROWS, "return own_column(block) < rows.rank@@ - 24@;"),
    ("RoPE's scores", KEYS, "if (@part.has_rope()@false@)"),
    ("place of a score", LISTS, "* kScorePitch +@ heads * kSide +@@\n"),
    ("parts of scores", WIDE_ROWS, "i < kPromptSimdgroups@@ - 7@; i++) {\n        score +="),
    ("scale", KEYS, "@score *= params.scale;@@"),
    ("listed keys", LISTS, "listed = first@ + own_key@@ < count"),
    ("weights of the listed", LISTS, "weight =\n          @listed@true@ ? glm"),
    ("largest score before", KEYS, "larger(@most@-INFINITY@, score)"),
    ("largest score of a head", KEYS, "larger(largest, @simd_shuffle_xor(largest, step)@largest@)"),
    ("factor", KEYS, "total > 0 ? @glm_fused::exp_negative(most - largest)@1.0f@"),
    ("sum of weights", KEYS, "sum += @simd_shuffle_xor(sum, step)@0@;"),
    ("total", KEYS, "total = fma(total, @factor@1.0f@, sum)"),
    ("most", KEYS, "@most = largest;@@"),
    ("one factor", KEYS, "@if (own_key == 0) {@{@\n        factors"),
    ("factor of a row", KEYS, "scale = factors[@row@0@]"),
    ("weights of the keys", LISTS, "i * kSide@ + matrix_column(lane)@@;\n          left"),
    ("values of the keys", LISTS, "left[@i@0@], keys"),
    ("keys' values", LISTS, "keys[@i@0@].matrix(d), sum_of_keys"),
    ("rescaled sums", KEYS, "fma(sums[at], float2(@scale@1.0f@)"),
    ("totals", KEYS, "@if (own_key == 0) {@{@\n    totals"),
    ("rows written", LISTS, "if (@row < part.heads && @@column < rank)"),
    ("columns written", KEYS, "if (row < part.heads@ && column < rank@@)"),
    ("no keys", NO_KEYS, "@all == 0 ? 0.0f : @@sums"),
    ("divided", KEYS, "sums[i / 2][i % 2]@ / all@@;"),
    ("entries", LISTS, "entry < entries@@ - kSplit@; entry"),
    ("passes over a split", LISTS, "first < count@@ - kPromptKeys@; first"),
]
# No run can show these, because the changed shader is as right; the reason is told.
EQUIVALENT = [
    # Its sums are stored nowhere, and its vectors lie in the threadgroup's memory.
    ("order of parts", FEW, "kWideStep = @2@4@;"),
]
MUTATIONS = [
    Mutation(name, case, kernel, *change)
    for kernel, table in (
        ("group_pairs", GROUP_PAIRS),
        ("grouped_gate_up", GATE_UP),
        ("grouped_down", DOWN),
        ("mla_prompt", MLA),
    )
    for name, case, *change in table
]
SAME = [Mutation(name, case, "grouped_gate_up", *change) for name, case, *change in EQUIVALENT]
mutants = Mutants(MUTATIONS, SAME)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shader_itself_is_clean(case):
    launches = mutants.right(case).launches
    assert all(launch.report.clean for launch in launches), launches


@pytest.mark.parametrize("mutation", mutants.params(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation):
    assert mutants.caught_by(mutation)


@pytest.mark.parametrize("mutation", mutants.params(SAME), ids=str)
def test_equivalent_change_gives_the_same(mutation):
    assert not mutants.caught_by(mutation)
