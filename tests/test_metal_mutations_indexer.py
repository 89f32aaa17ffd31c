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
        keys[:, list(self.loud)] *= 2**20
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
CLOSE = Indexing("close", 300, 100, close=True)
# One key lies past whole simdgroups, and is wanted.
TAIL = Indexing("tail", 129, 5, loud=(128,))
# Simdgroups take several steps, in which equal words are wanted.
LONG = Indexing("long", 4500, 1500, dim=1, loud=(0,), zeros=0.97)
# The last list has the one that is wanted.
LAST = Indexing("last", 500, 1, loud=(499,))
# Of the wanted one no other word has a digit but the first.
ONES = [Indexing(f"one of four, {j}", 300, 1, loud=(200 + j,)) for j in range(4)]
# Words differ in their first digit alone.
TWINS = Indexing("twins", 300, 250, dim=1, loud=tuple(range(0, 300, 7)), close=True)
# Several threadgroups select: the first sees few keys, the next none too few.
MANY = Indexing("many", 32900, 40, dim=1, b=2, queries=2, start=(16350, 0), zeros=0.5)
# What several threadgroups keep is still too much for one; the last of the next has fewer words.
DEEP = Indexing("deep", 135000, 4096, dim=1, zeros=0.9)
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
    LONG,
    LAST,
    *ONES,
    TWINS,
    MANY,
    DEEP,
]

# Each has a name, a case and a change, whose text has @old@new@ where it differs. Where the text
# occurs several times, a number follows that tells which.
BARRIER = "@  threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
SCORES = [
    *((f"barrier {i}", ODD, BARRIER, i) for i in range(2)),
    ("block before the start", EDGES, "key + kScoreKeys <= visible.low@@ + 1@ ||"),
    ("block past the end", EDGES, "|| key >= visible.high@@ - 1@) {"),
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
    ("query of the heads", ODD, "block = q + @head@0@ * dim"),
    ("sums zeroed", ODD, "i < 2 * kHeads@@ + 1@; i++) {\n      dot[i] = 0"),
    ("sums zeroed, one less", EDGES, "i < 2 * kHeads@@ - 1@; i++) {\n      dot[i] = 0"),
    ("first dimensions", ODD, "used, dim, @0@kDims@, thread_id);"),
    ("next dimensions", ODD, "used, dim, first@ + kDims@@, thread_id);"),
    ("blocks of dimensions, one less", ODD, "first < dim@@ - 1@; first += kDims"),
    ("chunks", EDGES, "kKeyChunks * kScoreKeys / kScoreThreads@@ + 1@;"),
    ("chunks, one less", EDGES, "kKeyChunks * kScoreKeys / kScoreThreads@@ - 1@;"),
    ("queries of a thread", EDGES, "values = kDims * kHeads / kScoreThreads@@ + 1@;"),
    ("queries of a thread, one less", EDGES, "kDims * kHeads / kScoreThreads@@ - 1@;"),
    ("key of the block", EDGES, "row = @key + @@at / kKeyChunks"),
    ("dimensions of the block", ODD, "column = @first + @@at % kKeyChunks"),
    ("first visible key loaded", EDGES, "row >= visible.low@@ + 1@ && row"),
    ("hidden keys before the start", EDGES, "row >= visible.low@@ - 1@ && row"),
    ("keys before the start mask", EDGES, "if (@row >= visible.low && @@row < visible.high"),
    ("last visible key loaded", ODD, "row < visible.high@@ - 1@ && column"),
    ("hidden keys past the end", ODD, "row < visible.high@@ + 1@ && column"),
    ("keys past the end mask", ODD, "row >= visible.low@ && row < visible.high@@ && column"),
    ("dimensions of keys", EDGES, "&& column < dim@@ + 1@) {"),
    ("dimensions of keys, one less", ODD, "&& column < dim@@ - 1@) {"),
    ("dimensions of keys mask", EDGES, "row < visible.high@ && column < dim@@) {"),
    ("end of a key", SHORT, "load(rows, row, column, dim@@ + 1@);"),
    ("end of a key, one less", SHORT, "load(rows, row, column, dim@@ - 1@);"),
    ("keys that are not loaded", SHORT, "@keys[i].clear();@@"),
    ("query of the block", ODD, "d = @first + @@at % kDims"),
    ("dimensions of queries", SHORT, "queries[i] = d < dim@@ + 1@ &&"),
    ("dimensions of queries, one less", SHORT, "queries[i] = d < dim@@ - 1@ &&"),
    ("dimensions of queries mask", SHORT, "queries[i] = @d < dim && @@head"),
    ("heads of queries", SHORT, "d < dim && head < heads@@ + 1@\n"),
    ("heads of queries, one less", SHORT, "d < dim && head < heads@@ - 1@\n"),
    ("heads of queries mask", SHORT, "d < dim@ && head < heads@@\n"),
    ("head of a query", ODD, "(q[@head * dim + @@d])"),
    ("values stored, one less", EDGES, "j < kChunk@@ - 1@; j++) {\n        k["),
    ("key of a value", EDGES, "k[(d + j) * kKeyPitch@ + row@@] ="),
    ("dimension of a chunk", EDGES, "k[(@d + @@j) * kKeyPitch"),
    ("dimension of a value", EDGES, "k[(d@ + j@@) * kKeyPitch"),
    ("dimension of a query", EDGES, "shared[@at % kDims * kHeads + @@at / kDims]"),
    ("products", EDGES, "d < kDims@@ + 1@; d++"),
    ("products, one less", EDGES, "d < kDims@@ - 1@; d++"),
    ("heads multiplied", EDGES, "i < kHeads / 4@@ + 1@; i++"),
    ("heads multiplied, one less", EDGES, "i < kHeads / 4@@ - 1@; i++"),
    ("four heads, one less", EDGES, "j < 4@@ - 1@; j++) {\n        const int at"),
    ("heads weighed, one less", EDGES, "h < kHeads@@ - 1@; h++) {\n      if"),
    ("heads weighed mask", SHORT, "if (h < used@@ + 1@) {"),
    ("heads weighed mask, one less", SHORT, "if (h < used@@ - 1@) {"),
    ("heads weighed mask, none", SHORT, "if (@h < used@true@) {"),
    ("weight of the heads", ODD, "weights[@head + @@h]"),
    ("factor of the weights", ODD, "h], @params.weight_scale@1.0f@)"),
    ("keys weighed", SHORT, "i < 2@@ + 1@; i++) {\n          score"),
    ("keys weighed, one less", SHORT, "i < 2@@ - 1@; i++) {\n          score"),
    ("keys stored, one less", SHORT, "i < 2@@ - 1@; i++) {\n    const int at = key"),
    ("first key stored", EDGES, "seen = at >= visible.low@@ + 1@ &&"),
    ("first key stored, one less", EDGES, "seen = at >= visible.low@@ - 1@ &&"),
    ("keys before the start stored", EDGES, "seen = @at >= visible.low && @@at < visible.high;"),
    ("last key stored", ODD, "&& at < visible.high@@ - 1@;"),
    ("last key stored, one more", ODD, "&& at < visible.high@@ + 1@;"),
    ("keys past the end stored", ODD, "seen = at >= visible.low@ && at < visible.high@@;"),
    ("hidden keys listed", EDGES, "word[i] = @seen ? ordered(score[i]) : 0u@ordered(score[i])@;"),
    ("hidden keys have words", EDGES, "    if (@seen@true@) {\n      words["),
    ("words of a query", ODD, "words[@size_t(tid.y) * params.columns + @@at]"),
    ("lists of a query", ODD, "lists += @first_list(tid.y, params.columns)@0@;"),
    ("list of a threadgroup", EDGES, "lists + (@tid.x * kLists + @@simd_gid) *"),
    ("list of a simdgroup", ODD, "lists + (tid.x * kLists@ + simd_gid@@) *"),
    ("first word listed", ODD, "first == 0 ? 0 : (first >> kFirstShift)@ + 1@@,"),
    ("second word listed", ODD, "second == 0 ? 0 : (second >> kFirstShift)@ + 1@@};"),
    ("no first word", EDGES, "@first == 0 ? 0 : @@(first >> kFirstShift)"),
    ("no second word", EDGES, "@second == 0 ? 0 : @@(second >> kFirstShift)"),
    ("words of a digit", PLATEAU, "simd_sum(uint(left[0] == most)@ + uint(left[1] == most)@@)"),
    ("digit of an entry", ODD, "(most@ - 1@@) | alike"),
    ("count of an entry", ODD, "(most - 1)@ | alike << kDigitBits@@;"),
    ("one lane lists", ODD, "if (@lane == 0@true@) {\n      list[count]"),
    ("one lane counts", ODD, "if (@lane == 0@true@) {\n    list[0]"),
    ("entries of a list", ODD, "list[0] = count@@ - 1@;"),
]  # fmt: skip
SELECT = [
    *((f"barrier {i}", case, BARRIER, i) for i, case in
      ((2, PLATEAU), (3, PLATEAU), (4, CLOSE), (5, PLATEAU), (7, PLATEAU))),
    ("words before the start", EDGES, "at + j >= low@@ - 1@ && at + j"),
    ("first word", EDGES, "at + j >= low@@ + 1@ && at + j"),
    ("words before the start mask", EDGES, "read[j] = @at + j >= low && @@at + j < high"),
    ("words past the end", ODD, "&& at + j < high@@ + 1@ ?"),
    ("last word", TAIL, "&& at + j < high@@ - 1@ ?"),
    ("words past the end mask", ODD, "at + j >= low@ && at + j < high@@ ?"),
    ("words read", SHORT, "if (at < high@@ + 1@) {"),
    ("words read, one less", TAIL, "if (at < high@@ - 1@) {"),
    ("digits cleared", PLATEAU, "i < kDigits@@ + 1@; i += threads"),
    ("digits cleared, one less", PLATEAU, "i < kDigits@@ - 1@; i += threads"),
    ("lists of a simdgroup", ODD, "i = begin@ + simdgroup@@; i < end"),
    ("lists counted", SHORT, "i = begin + simdgroup; i < end@@ + 1@;"),
    ("lists counted, one less", LAST, "i = begin + simdgroup; i < end@@ - 1@;"),
    ("entries counted", ODD, "entry < count@@ + 1@; entry"),
    ("entries counted, one less", PLATEAU, "entry < count@@ - 1@; entry"),
    ("digit of an entry", ODD, "add(listed@ & (kDigits - 1)@@,"),
    ("count of an entry", PLATEAU, "add(listed & (kDigits - 1), listed@ >> kDigitBits@@);"),
    ("words of a simdgroup", CLOSE, "begin = low / 4 * 4@ + simdgroup * 4 * kLanes@@;"),
    ("words of a step", LONG, "step = @simdgroups * @2 * @4 * kLanes;"),
    *((f"word {j} of four", ONES[j], f"@(read[{j}] & mask) == prefix@false@") for j in range(4)),
    ("all lanes go on", CLOSE, "if (!@simd_any(any)@any@) {"),
    ("prefix mask", TWINS, "counts = @(read[j] & mask) == prefix@true@;"),
    ("digit mask", CLOSE, "digit = read[j] >> shift@ & (kDigits - 1)@@;"),
    ("alike mask", TWINS, "simd_sum(uint(@counts && @@same))"),
    ("equal words mask", CLOSE, "simd_sum(uint(counts@ && same@@))"),
    ("one lane adds", CLOSE, "if (@lane == 0 && @@alike > 0) {"),
    ("counted mask", PLATEAU, "if (@counts && @@!same) {"),
    ("counted once", CLOSE, "if (counts@ && !same@@) {"),
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
    ("last bits", CLOSE, "shift >= @-1@0@;"),
    ("last shift mask", CLOSE, "at = @max(shift, 0)@shift@;"),
    ("digit of the lists", CLOSE, "if (begin < end@ && shift == kFirstShift@@) {"),
    ("no lists", MANY, "if (@begin < end && @@shift == kFirstShift) {"),
    ("as many as wanted", ONE_MORE, "visible.high - visible.low <= top_k@@ + 1@) {"),
    ("as many as wanted, one less", EXACT, "visible.high - visible.low <@=@@ top_k) {"),
    ("all wanted stored", FEW, "written = last ? top_k@@ + 1@ : 0;"),
    ("all wanted stored, one less", EXACT, "written = last ? top_k@@ - 1@ : 0;"),
    ("none left", FEW, "kept[i] = key < visible.high@@ + 1@ ?"),
    ("none left, one less", FEW, "kept[i] = key < visible.high@@ - 1@ ?"),
    ("none left mask", FEW, "kept[i] = @key < visible.high ? key : -1@key@;"),
    ("words of a query", ODD, "words += @size_t(tid.x) * params.columns@0@;"),
    ("lists of a query", ODD, "all ? @first_list(tid.x, params.columns)@0@ :"),
    ("keys of a query", MANY, "params.columns) : @size_t(tid.x) * params.columns@0@;"),
    ("chosen of a query", ODD,
     "(@size_t(params.index.b) * params.index.rows.queries + query@0@) * top_k;"),
    ("kept of a query", MANY, "at = @size_t(tid.x) * params.kept_columns + @@tid.y"),
    ("kept of a stretch", MANY, "params.kept_columns@ + tid.y * top_k@@;"),
    ("words of a stretch", MANY, "begin = @tid.y * params.stretch@0@;"),
    ("end of a stretch", MANY, "end = min(@begin + @@params.stretch, params.count)"),
    ("end of the words", DEEP,
     "end = @min(begin + params.stretch, params.count)@begin + params.stretch@;"),
    ("words of the next stretch", DEEP, "begin = tid.y * @params.stretch@(params.stretch - 4)@;"),
    ("first visible word", EDGES, "low = all ? @max(begin, visible.low)@begin@ : begin"),
    ("last visible word", ODD, "high = all ? @min(end, visible.high)@end@ : end"),
    ("fewer than wanted", MANY, "if (!last && high - low <= top_k@@ - 30@) {"),
    ("few words stored", MANY, "i = thread_id; i < top_k@@ + 1@; i += threads"),
    ("few words stored, one less", MANY, "i = thread_id; i < top_k@@ - 1@; i += threads"),
    ("few words mask", MANY, "is_word = at < high@@ + 1@;"),
    ("few words mask, one less", MANY, "is_word = at < high@@ - 1@;"),
    ("first list", EDGES, "low / kScoreKeys * kLists@@ + 4@, lists);"),
    ("lists before", EDGES, "low / kScoreKeys * kLists@@ - 1@, lists);"),
    ("last list", SHORT, "lists = all ? (high@ + kScoreKeys - 1@@) / kScoreKeys"),
    ("stretch of a simdgroup", TAIL, "(high - first@ + 4 * threads - 1@@) / (4 * threads)"),
    ("stretches of simdgroups", ODD, "from = first@ + int(simd_gid) * share@@;"),
    ("end of a simdgroup's stretch", ODD, "to = min(from + share@@ + 4@, high);"),
    ("words ranked", ODD, "i < to@@ + 1@; i += step) {\n    const uint4 read = selection.four(i"),
    ("larger words", PLATEAU, "larger += read[j] >@@=@ least.word"),
    ("ties", LONG, "ties += read[j] @==@>=@ least.word;\n    }\n  }"),
    ("one lane tells", ODD, "if (@simd_lid == 0@true@) {\n    above"),
    ("simdgroups before", PLATEAU, "before = simd_lid <@@=@ simd_gid"),
    ("ties before mask", PLATEAU, "simd_sum(@before ? equal[simd_lid] : 0u@equal[simd_lid]@)"),
    ("larger before mask", ODD, "simd_sum(@before ? above[simd_lid] : 0u@above[simd_lid]@)"),
    ("ties taken before", PLATEAU, "+ @min(tied, least.ties)@tied@;"),
    ("words taken, one less", TAIL, "i < to@@ - 1@; i += step) {\n    const int at"),
    ("words taken, one more", ODD, "i < to@@ + 1@; i += step) {\n    const int at"),
    ("ties of a step", LONG, "    @ties = 0;\n@@    GLM_UNROLL"),
    ("ties of lanes before", PLATEAU, "rank = tied@ + simd_prefix_exclusive_sum(ties)@@;"),
    ("ties wanted", PLATEAU, "rank <@@=@ least.ties)"),
    ("ties wanted mask", PLATEAU, "(tie@ && rank < least.ties@@)"),
    ("ties mask", ODD, "(@tie && @@rank < least.ties)"),
    ("ties of a lane", PLATEAU, "      @rank += tie;\n@@      count"),
    ("kept of lanes before", ODD, "place = taken@ + simd_prefix_exclusive_sum(count)@@;"),
    ("kept mask", ODD, "if (@keep[j]@at + j < high@) {"),
    ("word of four", ODD, "kept[place] = all ? at@ + j@@ :"),
    ("key of four", MANY, "int(source[at@ + j@@]);"),
    ("words kept too", MANY, "if (@!last@last@) {\n          kept_words"),
    ("place of four", LONG, "        @place++;\n@@"),
    ("kept of a step", LONG, "    @taken += simd_sum(count);\n@@"),
    ("ties of steps before", LONG, "    @tied += simd_sum(ties);\n@@"),
]  # fmt: skip
# No run can show these, because the changed shader is as right; the reason is told.
EQUIVALENT = [
    # A block without visible keys has no words and empty lists, which nothing reads.
    ("index_scores", "empty blocks", ODD, "key + kScoreKeys <= visible.low@@ - 1@ ||"),
    # The mask that follows lets no head past the last be weighed.
    ("index_scores", "heads weighed", EDGES, "h < kHeads@@ + 1@; h++) {\n      if"),
    # `clear` meets at a barrier before `find` writes what has been read here.
    ("index_select", "barrier 6", PLATEAU, BARRIER, 6),
    # Without the mask nothing is added.
    ("index_select", "alike mask of none", CLOSE, "if (lane == 0@ && alike > 0@@) {"),
    # No lane of such a simdgroup has anything to count.
    ("index_select", "all simdgroups count", CLOSE, "if (@!simd_any(any)@false@) {"),
    # Wider stretches share the words out otherwise.
    ("index_select", "wider stretches", ODD, "(high - first + 4 * threads@ - 1@@) / (4"),
    # Nobody comes after the last stretch, the one that may end with a step's first word.
    ("index_select", "words ranked, one less", TAIL,
     "i < to@@ - 1@; i += step) {\n    const uint4 read = selection.four(i"),
    # Past the end there are no words.
    ("index_select", "stretches past the end", ODD, "to = @min(from + share, high)@from + share@;"),
]  # fmt: skip

MUTATIONS = [
    Mutation(name, case, kernel, *change)
    for kernel, table in (("index_scores", SCORES), ("index_select", SELECT))
    for name, case, *change in table
]
SAME = [Mutation(name, case, kernel, *change) for kernel, name, case, *change in EQUIVALENT]
indexer = Mutants(MUTATIONS, SAME)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shader_itself_is_clean(case):
    launches = indexer.right(case).launches
    assert all(launch.report.clean for launch in launches), launches
    with cpu():
        expected = np.array(case.run())
    assert launches[-1].outputs[2] == expected.tobytes()


@pytest.mark.parametrize("mutation", indexer.params(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation):
    assert indexer.caught_by(mutation)


@pytest.mark.parametrize("mutation", indexer.params(SAME), ids=str)
def test_equivalent_change_gives_the_same(mutation):
    assert not indexer.caught_by(mutation)
