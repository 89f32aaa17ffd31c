"""Every barrier, bound and mask of sparse_mla_decode's shaders and of the cached rows is needed, as
test_metal_mutations says."""

import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from formats_under_test import assert_same_bits
from long_context import random, random_rows
from metal_backend import cpu
from metal_mutants import Mutants, Mutation

from glm_fused import ops


@dataclass(frozen=True)
class Attention:
    """A case of some heads over a list of `listed` keys, or over all keys where that is 0.

    The list holds the last key, key 0 where another follows it, and, with `gaps`, keys that no
    query sees. Its entries in `empty` are -1.
    """

    name: str
    heads: int
    rank: int
    rope: int = 0
    total: int = 90
    listed: int = 0
    b: int = 1
    queries: int = 1
    kv_format: str = "fp32"
    start: tuple[int, ...] | None = None
    gaps: bool = False
    empty: tuple[int, int] = (0, 0)
    seed: int = 0
    tiles = None

    @functools.cache  # noqa: B019
    def arguments(self):
        rng = np.random.default_rng([self.seed, self.heads, self.rank])
        latents, ropes = random_rows(rng, self.kv_format, self.b, self.total, self.rank, self.rope)
        q = random(rng, (self.b, self.queries, self.heads, self.rank + self.rope))
        return latents, ropes, q, self.selection(rng)

    def selection(self, rng):
        if not self.listed:
            return None
        lists = []
        for _ in range(self.b * self.queries):
            keys = 1 + rng.permutation(self.total - 2)[: self.listed]
            keys[: min(2, self.listed) // 2] = 0
            keys[-1] = self.total - 1
            if self.gaps:
                keys[3:60:7] = np.resize([-1, -2, self.total, self.total + 7], 9)
            keys[slice(*self.empty)] = -1
            lists.append(keys)
        shape = (self.b, self.queries, self.listed)
        return mx.array(np.array(lists, np.int32).reshape(shape))

    def run(self):
        latents, ropes, q, selected = self.arguments()
        start = None if self.start is None else mx.array(self.start, mx.int32)
        return ops.sparse_mla_decode(
            q, latents, ropes, selected, rank=self.rank, scale=0.3, start=start
        )


# It has two sequences, each with a start of its own; the second split is not whole.
DENSE = Attention("dense", 3, 25, 8, total=70, b=2, start=(3, 0))
# Its start is before the first key.
EARLY = Attention("early", 1, 8, total=66, start=(-5,))
# Its start is past some of the listed keys.
LATE = Attention("late", 1, 8, total=22, listed=20, start=(12,))
LISTED = Attention("listed", 2, 40, 8, listed=66, queries=2, gaps=True)
# No list entry, head or dimension is left over.
FULL = Attention("full", 64, 64, listed=64)
HEADS = Attention("heads", 65, 33, 7, listed=3)
# The second of three splits has no keys.
EMPTY = Attention("empty", 3, 8, listed=130, total=140, empty=(3, 128))
# Nothing is listed that a query sees.
NOTHING = Attention("nothing", 2, 8, listed=3, empty=(0, 3))
ONE = Attention("one", 5, 8, listed=1)
FP8 = Attention("fp8", 1, 128, 8, listed=4, kv_format="fp8")
INT8 = Attention("int8", 1, 8, 8, listed=4, kv_format="int8")
CASES = [DENSE, EARLY, LATE, LISTED, FULL, HEADS, EMPTY, NOTHING, ONE, FP8, INT8]

# Each has a name, a case and a change, whose text has @old@new@ where it differs. Where the text
# occurs several times, a number follows that tells which.
BARRIER = "@  threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
SPLIT = [
    *((f"barrier {i}", LISTED, BARRIER, i) for i in range(1, 9)),
    # cached_rows.h
    ("columns of a latent", LISTED, "column <@@=@ rank) {", 0),
    ("columns of a latent, one less", LISTED, "column < rank@@ - 1@) {", 0),
    ("row of a key", LISTED, "latents@ + key * latent_stride@@))[column]"),
    ("RoPE row of a key", LISTED, "ropes@ + key * rope_stride@@))"),
    ("columns of a RoPE key", LISTED, "[column - rank@@ + 1@]"),
    ("columns of a code", FP8, "column <@@=@ rank) {", 1),
    ("columns of a code, one less", FP8, "column < rank@@ - 1@) {", 1),
    ("row of codes", FP8, "row = latents@ + key * latent_stride@@;"),
    ("scales of a row", FP8, "(rank + tile@ - 1@@) / tile"),
    ("scales of a row, one less", INT8, "scales(int) {\n    return @1@0@;"),
    ("scale of a column", FP8, "return @column@(column + 1)@ / tile"),
    ("sign of a code", FP8, "ushort(code@ & 0x80@@) << 8"),
    ("magnitude of a code", FP8, "ushort(code@ & 0x7f@@) << 7"),
    ("sign of an integer", INT8, "static_cast<float>(@static_cast<int8_t>(code)@code@)"),
    ("sequence of latents", DENSE, "latents@ + b * params.latent_sequence@@,"),
    ("sequence of RoPE keys", DENSE, "ropes@ + b * params.rope_sequence@@,"),
    ("start of a sequence", DENSE, "start[@b@0@]"),
    ("start before the first key", EARLY, "clamp(start[b], @0@-9@, params.keys)"),
    ("last visible key", LISTED, "params.queries + query + @1@2@)"),
    ("last visible key, one less", LISTED, "params.queries + query@ + 1@@)"),
    # listed_key
    ("a list", DENSE, "params.listed >@@=@ 0) {"),
    ("a list of one", ONE, "params.listed > @0@1@) {"),
    ("entries", LISTED, "entry <@@=@ params.listed"),
    ("entries, one less", LISTED, "entry < params.listed@@ - 1@"),
    ("entries mask", LISTED, "key = @entry < params.listed@true@"),
    ("list of a token", LISTED, "selected[@size_t(token) * params.listed + @@entry]"),
    ("low mask", DENSE, "return key >= visible.low@@ + 1@ &&"),
    ("low mask, one more", LATE, "return key >= visible.low@@ - 1@ &&"),
    ("low mask, none", LATE, "return @key >= visible.low && @@key <"),
    ("high mask", LISTED, "key < visible.high@@ + 1@ ?"),
    ("high mask, one less", LISTED, "key < visible.high@@ - 1@ ?"),
    ("high mask, none", LISTED, "key >= visible.low@ && key < visible.high@@ ?"),
    # load_dims
    ("loads", FULL, "i < kSplit * kDepth@@ + 1@; i +=", 0),
    ("loads, one less", FULL, "i < kSplit * kDepth@@ - 1@; i +=", 0),
    ("dimensions mask", LISTED, "if (d < depth@@ + 1@) {"),
    ("dimensions mask, one less", LISTED, "if (d < depth@@ - 1@) {"),
    ("dimensions mask, none", LISTED, "if (@d < depth@true@) {"),
    ("heads mask", LISTED, "head = row < heads@@ + 1@,"),
    ("heads mask, one less", LISTED, "head = row < heads@@ - 1@,"),
    ("heads mask, none", LISTED, "head = @row < heads@true@,"),
    ("keys mask", LISTED, ", key = list[row] >= @0@-1@;"),
    ("keys mask, one less", LISTED, ", key = list[row] >@=@@ 0;"),
    ("query of the block", LISTED, "dims@ + first@@ + d])"),
    ("key of the block", LISTED, "rows.value(list[row], @first + @@d)"),
    # scores
    ("sums zeroed", LISTED, "kEach * kEach@@ + 1@; i++) {\n      sum[i] = 0"),
    ("sums zeroed, one less", FULL, "kEach * kEach@@ - 1@; i++) {\n      sum[i] = 0"),
    ("blocks, one less", DENSE, "first < dims@@ - 1@; first"),
    ("depth", LISTED, "min(kDepth, dims - first@@ + 1@)"),
    ("depth, one less", LISTED, "min(kDepth, dims - first@@ - 1@)"),
    ("depth mask", LISTED, "depth = @min(kDepth, dims - first)@kDepth@;"),
    ("depth of a block", LISTED, "depth = @min(kDepth, dims - first)@dims - first@;"),
    ("products", LISTED, "d < depth@@ + 1@; d++"),
    ("products, one less", LISTED, "d < depth@@ - 1@; d++"),
    ("pairs", LISTED, "kEach * kEach@@ + 1@; i++) {\n          const float a"),
    ("pairs, one less", FULL, "kEach * kEach@@ - 1@; i++) {\n          const float a"),
    ("scores", LISTED, "kEach * kEach@@ + 1@; i++) {\n      const int head"),
    ("scores, one less", FULL, "kEach * kEach@@ - 1@; i++) {\n      const int head"),
    # softmax
    ("heads of a maximum", LISTED, "if (thread_id < kSplit@@ + 1@) {\n      float"),
    ("heads of a maximum, one less", LISTED, "if (thread_id < kSplit@@ - 1@) {\n      float"),
    ("keys of a maximum", FULL, "key < kSplit@@ + 1@; key++) {\n        const float s"),
    ("keys of a maximum, one less", FULL, "key < kSplit@@ - 1@; key++) {\n        const float s"),
    ("keys of a maximum, mask", ONE, "largest = @list[key] >= 0 && @@s"),
    ("keys of a maximum, key 0", FULL, "largest = list[key] >@=@@ 0 &&"),
    ("powers", FULL, "i < kSplit * kSplit@@ + 1@; i +="),
    ("powers, one less", FULL, "i < kSplit * kSplit@@ - 1@; i +="),
    ("heads of a sum", LISTED, "if (thread_id < heads@@ + 1@) {"),
    ("heads of a sum, one less", LISTED, "if (thread_id < heads@@ - 1@) {"),
    ("heads of a sum, none", LISTED, "if (@thread_id < heads@true@) {"),
    ("keys of a sum", FULL, "key < kSplit@@ + 1@; key++) {\n        sum"),
    ("keys of a sum, one less", FULL, "key < kSplit@@ - 1@; key++) {\n        sum"),
    ("keys of a sum, mask", LISTED, "sum = @list[key] >= 0@true@ ?"),
    ("keys of a sum, key 0", LISTED, "sum = list[key] >@=@@ 0 ?"),
    # values
    ("values", FULL, "i < kSplit * kDepth@@ + 1@; i +=", 1),
    ("values, one less", FULL, "i < kSplit * kDepth@@ - 1@; i +=", 1),
    ("keys of values, mask", LISTED, "block[i] = @key >= 0 && @@column"),
    ("keys of values, key 0", LISTED, "block[i] = key >@=@@ 0 &&"),
    ("columns of values", LISTED, "&& column < rank@@ + 1@ ? rows"),
    ("columns of values, one less", LISTED, "&& column < rank@@ - 1@ ? rows"),
    ("columns of values, mask", LISTED, "key >= 0@ && column < rank@@ ? rows"),
    ("sums of values zeroed", LISTED, "kEach * wide@@ + 1@; i++) {\n      sum[i] = 0"),
    ("sums of values zeroed, one less", FULL, "kEach * wide@@ - 1@; i++) {\n      sum[i] = 0"),
    ("keys weighed", FULL, "key < kSplit@@ + 1@; key++) {\n      if"),
    ("keys weighed, one less", FULL, "key < kSplit@@ - 1@; key++) {\n      if"),
    ("keys weighed, mask", EMPTY, "if (@list[key] >= 0@true@) {"),
    ("keys weighed, key 0", LISTED, "if (list[key] >@=@@ 0) {"),
    ("columns weighed", LISTED, "kEach * wide@@ + 1@; i++) {\n          const float a"),
    ("columns weighed, one less", FULL, "kEach * wide@@ - 1@; i++) {\n          const float a"),
    ("columns stored, one less", FULL, "kEach * wide@@ - 1@; i++) {\n      const int head"),
    ("heads stored", LISTED, "if (head < heads@@ + 1@ &&"),
    ("heads stored, one less", LISTED, "if (head < heads@@ - 1@ &&"),
    ("heads stored, mask", LISTED, "if (@head < heads && @@column < rank) {"),
    ("columns stored, mask", LISTED, "if (head < heads@ && column < rank@@) {"),
    ("columns stored, one more", LISTED, "if (head < heads && column < rank@@ + 1@) {"),
    ("columns stored, last", LISTED, "if (head < heads && column < rank@@ - 1@) {"),
    # mla_split
    ("list", LISTED, "if (thread_id < kSplit@@ + 1@) {\n    const"),
    ("list, one less", LISTED, "if (thread_id < kSplit@@ - 1@) {\n    const"),
    ("heads of a threadgroup", HEADS, "min(kSplit, params.heads - head@@ + 1@)"),
    ("heads of a threadgroup, one less", HEADS, "min(kSplit, params.heads - head@@ - 1@)"),
    ("heads left", HEADS, "@min(kSplit, params.heads - head)@kSplit@,"),
    ("heads at once", HEADS, "@min(kSplit, params.heads - head)@params.heads - head@,"),
    ("blocks of values, one less", HEADS, "column < rank@@ - 1@; column += kDepth"),
    ("query of a token", LISTED, "q + (@size_t(token) * params.heads + @@head) * dims"),
    ("results of a split", LISTED, "(size_t(tid.z) * params.splits@ + tid.x@@) * params.heads"),
    ("results of a head", HEADS, "params.heads@ + head@@;\n  const MlaSplit"),
    ("values of a split", LISTED, "part.values(column, rank, o@ + first * rank@@)"),
]
COMBINE = [
    ("barrier", LISTED, BARRIER, 0),
    ("splits of a maximum", EMPTY, "s < splits@@ + 1@; s++", 0),
    ("splits of a maximum, one less", EMPTY, "s < splits@@ - 1@; s++", 0),
    ("weights", EMPTY, "s < splits@@ + 1@; s += threads"),
    ("weights, one less", EMPTY, "s < splits@@ - 1@; s += threads"),
    ("splits of the total", EMPTY, "s < splits@@ + 1@; s++", 1),
    ("splits of the total, one less", EMPTY, "s < splits@@ - 1@; s++", 1),
    ("a query without keys", NOTHING, "y.set(column, @any ? value / total : 0.0f@value / total@)"),
    ("columns", LISTED, "column < rank@@ + 1@; column += threads"),
    ("columns, one less", LISTED, "column < rank@@ - 1@; column += threads"),
    ("splits of a value", EMPTY, "s < splits@@ + 1@; s++", 2),
    ("splits of a value, one less", EMPTY, "s < splits@@ - 1@; s++", 2),
    # These reads would change nothing.
    ("maximum of an empty split", EMPTY, "largest = @l[at] != 0 && @@m[at]"),
    ("values of an empty split", EMPTY, "value =\n          @l[at] != 0@true@ ?"),
    ("results of a token", LISTED, "= @size_t(tid.y) * params.splits * params.heads + @@tid.x"),
    ("token of the result", LISTED, "y + (@size_t(token) * params.heads + @@tid.x)"),
]  # fmt: skip
END = "params.keys - params.queries + query + 1"
# No run can show these, because the changed shader is as right; the reason is told.
EQUIVALENT = [
    # A start past the last key makes no key visible, clamped or not.
    ("mla_split", "start past the last key", DENSE, "clamp(start[b], 0, params.keys@@ + 1@)"),
    # An end before the start shows as few keys as one at it.
    ("mla_split", "end before the start", DENSE, f"Visible{{low, @max(low, {END})@{END}@}}"),
    # The block past the last has no dimensions.
    ("mla_split", "blocks", FULL, "first < dims@@ + 1@; first"),
    # The block past the last has no columns.
    ("mla_split", "blocks of values", FULL, "column < rank@@ + 1@; column += kDepth"),
    # The ninth sum of a thread is of a head past a threadgroup's last.
    ("mla_split", "columns stored", FULL, "kEach * wide@@ + 1@; i++) {\n      const int head"),
    # The weight of a split without keys is 0, and so is its sum.
    ("mla_combine", "total of an empty split", EMPTY, "total = @sum != 0@true@ ?"),
]

MUTATIONS = [
    Mutation(name, case, kernel, *change)
    for kernel, table in (("mla_split", SPLIT), ("mla_combine", COMBINE))
    for name, case, *change in table
]
SAME = [Mutation(name, case, kernel, *change) for kernel, name, case, *change in EQUIVALENT]
mla = Mutants([*MUTATIONS, *SAME])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shader_itself_is_clean(case):
    launches = mla.right(case).launches
    assert all(launch.report.clean for launch in launches), launches
    with cpu():
        expected = case.run()
    there = np.frombuffer(launches[1].outputs[3], np.float32).reshape(expected.shape)
    assert_same_bits(mx.array(there), expected)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_caught(mutation):
    assert mla.caught_by(mutation)


@pytest.mark.parametrize("mutation", SAME, ids=str)
def test_equivalent_change_gives_the_same(mutation):
    assert not mla.caught_by(mutation)
