"""Every barrier, bound and mask of indexer_topk's shaders is needed, as test_metal_mutations
says."""

import functools
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from long_context import random
from metal_backend import cpu
from metal_mutants import Mutants, Mutation

from glm_fused import ops


@dataclass(frozen=True)
class Indexing:
    """A case of the `k` best of `total` keys.

    The keys `loud` have the largest scores; where there are any, all scores are positive. A part
    `zeros` of the keys is zero. The other scores are `close` if their last bits alone differ.
    """

    name: str
    total: int
    k: int
    heads: int = 1
    dim: int = 8
    b: int = 1
    queries: int = 1
    start: tuple[int, ...] | None = None
    loud: tuple[int, ...] = ()
    zeros: float = 0.0
    close: bool = False
    factor: float = 1.0  # of the weights
    tiles = None

    @functools.cache  # noqa: B019
    def arguments(self):
        rng = np.random.default_rng([self.heads, self.dim, self.total])
        q = random(rng, (self.b, self.queries, self.heads, self.dim))
        keys = np.array(random(rng, (self.b, self.total, self.dim)))
        weights = random(rng, (self.b, self.queries, self.heads))
        keys[rng.random(keys.shape[:2]) < self.zeros] = 0
        if self.loud or self.close:
            q, weights, keys = mx.abs(q), mx.abs(weights), np.abs(keys)
        if self.close:
            keys = 1 + 1e-6 * keys
        keys[:, list(self.loud)] *= 1e6
        return q, mx.array(keys), weights

    def run(self):
        start = None if self.start is None else mx.array(self.start, mx.int32)
        return ops.indexer_topk(
            *self.arguments(), self.k, scale=0.12, weight_scale=self.factor, start=start
        )


# Heads, dimensions and keys are left over; the second query sees one key more.
ODD = Indexing("odd", 300, 40, heads=33, dim=17, queries=2, factor=0.7)
# No head or dimension is left over; the first block shows its last key, the third its first.
EDGES = Indexing("edges", 513, 40, heads=32, dim=16, start=(255,), loud=(255, 512))
BATCH = Indexing("batch", 40, 8, b=2, start=(0, 5))
SHORT = Indexing("short", 300, 40, heads=3, dim=5)
# More scores are equal than are wanted, in several simdgroups.
PLATEAU = Indexing("plateau", 500, 40, zeros=0.9)
# These have as many keys as are wanted, one more, and fewer.
EXACT, ONE_MORE, FEW = (
    Indexing("exact", 40, 40),
    Indexing("one more", 41, 40),
    Indexing("few", 9, 40),
)
# The wanted ones end where the digits of a lane do; one more is wanted.
GAP = Indexing("gap", 80, 2, dim=2, loud=(7, 60), close=True)
PAST_GAP = Indexing("past gap", 80, 3, loud=(7, 60))
CLOSE = Indexing("close", 60, 20, close=True)
# One key lies past whole simdgroups, and is wanted.
TAIL = Indexing("tail", 65, 5, loud=(64,))
CASES = [
    ODD,
    EDGES,
    BATCH,
    SHORT,
    PLATEAU,
    EXACT,
    ONE_MORE,
    FEW,
    GAP,
    PAST_GAP,
    CLOSE,
    TAIL,
]

# Each has a name, a case and a change, whose text has @old@new@ where it differs. Where the text
# occurs several times, a number follows that tells which.
BARRIER = "@  threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
SCORES = [
    *((f"barrier {i}", ODD, BARRIER, i) for i in range(2)),
    ("block before the start", EDGES, "key + kScoreKeys <= low@@ + 1@ ||"),
    ("block past the end", EDGES, "|| key >= high@@ - 1@) {"),
    ("query of a token", ODD, "q +=@ token@ 0@ * heads * dim"),
    ("weights of a token", ODD, "weights +=@ token@ 0@ * heads"),
    ("keys of a sequence", BATCH, "latents@ + b * params.latent_sequence@@,"),
    ("start of a sequence", BATCH, "start[@b@0@]"),
    ("last visible key", ODD, "params.queries + query + @1@2@)"),
    ("last visible key, one less", ODD, "params.queries + query@ + 1@@)"),
    ("blocks of heads", EDGES, "head < heads@@ + 1@; head += kHeads"),
    ("blocks of heads, one less", ODD, "head < heads@@ - 1@; head += kHeads"),
    ("heads of a block", SHORT, "used = @min(kHeads, heads - head)@kHeads@;"),
    ("heads of a block, one more", SHORT, "min(kHeads, heads - head@@ + 1@)"),
    ("heads of a block, one less", SHORT, "min(kHeads, heads - head@@ - 1@)"),
    ("sums zeroed", ODD, "i < 2 * kHeads@@ + 1@; i++) {\n      dot[i] = 0"),
    ("sums zeroed, one less", EDGES, "i < 2 * kHeads@@ - 1@; i++) {\n      dot[i] = 0"),
    ("blocks of dimensions, one less", ODD, "first < dim@@ - 1@; first += kDims"),
    ("depth", SHORT, "depth = @min(kDims, dim - first)@kDims@;"),
    ("depth, one more", SHORT, "min(kDims, dim - first@@ + 1@)"),
    ("depth, one less", SHORT, "min(kDims, dim - first@@ - 1@)"),
    ("keys loaded", EDGES, "i < kDims * kScoreKeys@@ + 1@;"),
    ("keys loaded, one less", EDGES, "i < kDims * kScoreKeys@@ - 1@;"),
    ("first visible key loaded", EDGES, "seen = key + row >= low@@ + 1@ &&"),
    ("hidden keys before the start", EDGES, "seen = key + row >= low@@ - 1@ &&"),
    ("keys before the start mask", EDGES, "seen = @key + row >= low && @@key + row < high;"),
    ("last visible key loaded", ODD, "key + row < high@@ - 1@;"),
    ("hidden keys past the end", ODD, "key + row < high@@ + 1@;"),
    ("keys past the end mask", ODD, "seen = key + row >= low@ && key + row < high@@;"),
    ("dimensions of keys", SHORT, "d < depth@@ + 1@ && seen"),
    ("dimensions of keys, one less", SHORT, "d < depth@@ - 1@ && seen"),
    ("dimensions of keys mask", SHORT, "@d < depth && @@seen ?"),
    ("seen mask", ODD, "d < depth@ && seen@@ ?"),
    ("key of the block", ODD, "rows.value(key + row, @first + @@d)"),
    ("queries loaded", EDGES, "i < kDims * kHeads@@ + 1@;"),
    ("queries loaded, one less", EDGES, "i < kDims * kHeads@@ - 1@;"),
    ("dimensions of queries", SHORT, "d < depth@@ + 1@ && h < used"),
    ("dimensions of queries, one less", SHORT, "d < depth@@ - 1@ && h < used"),
    ("dimensions of queries mask", SHORT, "@d < depth && @@h < used"),
    ("heads of queries", SHORT, "&& h < used@@ + 1@\n"),
    ("heads of queries, one less", SHORT, "&& h < used@@ - 1@\n"),
    ("heads of queries mask", SHORT, "d < depth@ && h < used@@\n"),
    ("query of the heads", ODD, "q[(@head + @@h) * dim + first + d]"),
    ("query of the block", ODD, "q[(head + h) * dim@ + first@@ + d]"),
    ("products", EDGES, "d < depth@@ + 1@; d++"),
    ("products, one less", SHORT, "d < depth@@ - 1@; d++"),
    ("heads multiplied", EDGES, "h < kHeads@@ + 1@; h++) {\n          const float query"),
    ("heads multiplied, one less", EDGES, "h < kHeads@@ - 1@; h++) {\n          const float query"),
    ("heads weighed, one less", EDGES, "h < kHeads@@ - 1@; h++) {\n      if"),
    ("heads weighed mask", SHORT, "if (h < used@@ + 1@) {"),
    ("heads weighed mask, one less", SHORT, "if (h < used@@ - 1@) {"),
    ("heads weighed mask, none", SHORT, "if (@h < used@true@) {"),
    ("weight of the heads", ODD, "weights[@head + @@h]"),
    ("factor of the weights", ODD, "h], @params.weight_scale@1.0f@)"),
    ("keys weighed", SHORT, "i < 2@@ + 1@; i++) {\n          score"),
    ("keys weighed, one less", SHORT, "i < 2@@ - 1@; i++) {\n          score"),
    ("keys stored", SHORT, "i < 2@@ + 1@; i++) {\n    const int at"),
    ("keys stored, one less", SHORT, "i < 2@@ - 1@; i++) {\n    const int at"),
    ("first key stored", EDGES, "if (at >= low@@ + 1@ &&"),
    ("first key stored, one less", EDGES, "if (at >= low@@ - 1@ &&"),
    ("keys before the start stored", EDGES, "if (@at >= low && @@at < high) {"),
    ("last key stored", ODD, "&& at < high@@ - 1@) {"),
    ("last key stored, one more", ODD, "&& at < high@@ + 1@) {"),
    ("keys past the end stored", ODD, "if (at >= low@ && at < high@@) {"),
    ("words of a query", ODD, "words[@size_t(tid.y) * params.rows.keys + @@at]"),
]  # fmt: skip
SELECT = [
    *((f"barrier {i}", PLATEAU, BARRIER, i) for i in (2, 3, 4, 6)),
    ("digits cleared", PLATEAU, "i < kDigits@@ + 1@; i += threads"),
    ("digits cleared, one less", PLATEAU, "i < kDigits@@ - 1@; i += threads"),
    ("words counted, one less", TAIL, "i < high@@ - 1@; i += threads"),
    ("words counted mask", ODD, "valid = i + lane < high@@ + 1@;"),
    ("words counted mask, one less", TAIL, "valid = i + lane < high@@ - 1@;"),
    ("words counted mask, none", ODD, "valid = @i + lane < high@true@;"),
    ("prefix mask", ODD, "counts = valid@ && (word & mask) == prefix@@;"),
    ("digit mask", ODD, "digit = word >> shift@ & (kDigits - 1)@@;"),
    ("alike mask", ODD, "simd_sum(uint(@counts && @@same))"),
    ("equal words mask", ODD, "simd_sum(uint(counts@ && same@@))"),
    ("one lane adds", ODD, "if (@lane == 0 && @@alike > 0) {"),
    ("counted mask", ODD, "if (@counts && @@!same) {"),
    ("counted once", PLATEAU, "if (counts@ && !same@@) {"),
    ("one simdgroup finds", ODD, "if (@simdgroup == 0@true@) {"),
    ("digits of a lane", ODD, "i < share@@ + 1@; i++"),
    ("digits of a lane, one less", ODD, "i < share@@ - 1@; i++"),
    ("lane of the largest", GAP, "if (larger <@@=@ wanted &&"),
    ("lane of the last wanted", GAP, "larger + mine >@=@@ wanted)"),
    ("lane of the last wanted, one less", PAST_GAP, "larger + mine >= wanted@@ - 1@)"),
    ("lane of the last wanted mask", ODD, "larger < wanted@ && larger + mine >= wanted@@)"),
    ("lane of the largest mask", ODD, "if (@larger < wanted && @@larger + mine"),
    ("digit of the last wanted", GAP, "larger + here >@=@@ wanted"),
    ("digit of the last wanted, one less", PAST_GAP, "larger + here >= wanted@@ - 1@"),
    ("wanted of a digit", PLATEAU, "found[1] = wanted@ - larger@@;"),
    ("as many as wanted", ONE_MORE, "high - low <= top_k@@ + 1@) {"),
    ("as many as wanted, one less", EXACT, "high - low <@=@@ top_k) {"),
    ("all wanted stored", FEW, "i < top_k@@ + 1@; i += threads"),
    ("all wanted stored, one less", EXACT, "i < top_k@@ - 1@; i += threads"),
    ("none left", FEW, "chosen[i] = low + i < high@@ + 1@ ?"),
    ("none left, one less", FEW, "chosen[i] = low + i < high@@ - 1@ ?"),
    ("none left mask", FEW, "chosen[i] = @low + i < high ? low + i : -1@low + i@;"),
    ("last bits", CLOSE, "shift >= @-1@0@;"),
    ("last shift mask", CLOSE, "at = @max(shift, 0)@shift@;"),
    ("stretch of a simdgroup", TAIL, "((high - low@ + threads - 1@@) / threads)"),
    ("end of a stretch mask", ODD, "end = @min(begin + share, high)@begin + share@;"),
    ("end of a stretch", ODD, "min(begin + share, high@@ + 1@);"),
    ("end of a stretch, one less", TAIL, "min(begin + share, high@@ - 1@);"),
    ("words ranked", ODD, "i < end@@ + 1@; i += kLanes) {\n    larger"),
    ("words ranked, one less", ODD, "i < end@@ - 1@; i += kLanes) {\n    larger"),
    ("larger words", PLATEAU, "larger += words[i] >@@=@ prefix"),
    ("one lane tells", ODD, "if (@simd_lid == 0@true@) {\n    above"),
    ("simdgroups before", PLATEAU, "before = simd_lid <@@=@ simd_gid"),
    ("ties before mask", PLATEAU, "simd_sum(@before ? equal[simd_lid] : 0u@equal[simd_lid]@)"),
    ("larger before mask", ODD, "simd_sum(@before ? above[simd_lid] : 0u@above[simd_lid]@)"),
    ("ties taken before", PLATEAU, "+ @min(tied, wanted)@tied@;"),
    ("words taken, one less", TAIL, "i < end@@ - 1@; i += kLanes) {\n    const int at"),
    ("words taken mask", ODD, "word = @at < end ? words[at] : 0u@words[at]@;"),
    ("words taken mask, one more", ODD, "word = at < end@@ + 1@ ?"),
    ("words taken mask, last", TAIL, "word = at < end@@ - 1@ ?"),
    ("ties wanted", PLATEAU, "rank <@@=@ wanted)"),
    ("ties wanted mask", PLATEAU, "(tie@ && rank < wanted@@)"),
    ("ties mask", ODD, "(@tie && @@rank < wanted)"),
    ("kept mask", ODD, "if (@keep@at < end@) {"),
    ("words of a query", ODD, "all_words@ + size_t(tid.x) * params.rows.keys@@;"),
    ("chosen of a query", ODD, "chosen += (@size_t(params.b) * params.rows.queries + query@0@)"),
]  # fmt: skip
# No run can show these, because the changed shader is as right; the reason is told.
EQUIVALENT = [
    # A block without visible keys stores nothing, as a block that is left does.
    ("index_scores", "block before the start, one more", EDGES, "kScoreKeys <= low@@ - 1@ ||"),
    ("index_scores", "block past the end, one more", EDGES, "|| key >= high@@ + 1@) {"),
    # The block past the last has no dimensions.
    ("index_scores", "blocks of dimensions", EDGES, "first < dim@@ + 1@; first += kDims"),
    # The mask that follows lets no head past the last be weighed.
    ("index_scores", "heads weighed", EDGES, "h < kHeads@@ + 1@; h++) {\n      if"),
    # `count` meets at a barrier before `find` writes what has been read here.
    ("index_select", "barrier 5", PLATEAU, BARRIER, 5),
    # The step past the last has no valid lanes.
    ("index_select", "words counted", PLATEAU, "i < high@@ + 1@; i += threads"),
    # 0, the word of a lane that is not valid, is below the word of any score.
    ("index_select", "valid mask", ODD, "counts = @valid && @@(word"),
    # Without the mask nothing is added.
    ("index_select", "alike mask of none", ODD, "if (lane == 0@ && alike > 0@@) {"),
    # Wider stretches share the keys out otherwise.
    ("index_select", "wider stretches", ODD, "((high - low + threads@ - 1@@) / threads)"),
    # The step past the last has no keys.
    ("index_select", "words taken", PLATEAU, "i < end@@ + 1@; i += kLanes) {\n    const int at"),
    # 0 is neither the last wanted word nor above it.
    ("index_select", "ties past the end", ODD, "tie = @at < end && @@word"),
    ("index_select", "kept past the end", ODD, "keep = @at < end && @@(word"),
]  # fmt: skip

MUTATIONS = [
    Mutation(name, case, kernel, *change)
    for kernel, table in (("index_scores", SCORES), ("index_select", SELECT))
    for name, case, *change in table
]
SAME = [Mutation(name, case, kernel, *change) for kernel, name, case, *change in EQUIVALENT]
indexer = Mutants([*MUTATIONS, *SAME])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shader_itself_is_clean(case):
    launches = indexer.right(case).launches
    assert all(launch.report.clean for launch in launches), launches
    with cpu():
        expected = np.array(case.run())
    assert launches[-1].outputs[2] == expected.tobytes()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_mutation_is_caught(mutation):
    assert indexer.caught_by(mutation)


@pytest.mark.parametrize("mutation", SAME, ids=str)
def test_equivalent_change_gives_the_same(mutation):
    assert not indexer.caught_by(mutation)
