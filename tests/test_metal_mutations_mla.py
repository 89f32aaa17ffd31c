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
    query sees. Its entries in `empty` are -1. The second of two `tiny` keys has a weight whose
    products with its values are too small for fp32. A value of key 0's, or of a query's,
    is `infinite`.
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
    tiny: bool = False
    infinite: str = ""
    seed: int = 0
    tiles = None

    @functools.cache  # noqa: B019
    def arguments(self):
        rng = np.random.default_rng([self.seed, self.heads, self.rank])
        latents, ropes = random_rows(rng, self.kv_format, self.b, self.total, self.rank, self.rope)
        q = random(rng, (self.b, self.queries, self.heads, self.rank + self.rope))
        if self.tiny:
            first = mx.arange(self.rank) == 0
            q = mx.where(first, 1.0, mx.zeros_like(q))
            keys = mx.array([[280.0, 0.0], [0.0, -1e-12]])  # and their other dimensions
            latents = mx.where(first, keys[:, :1], keys[:, 1:])[None]
        if self.infinite == "key":
            latents[0, 0, 8] = float("inf")
        if self.infinite == "query":
            q[0, 0, 0, 8] = float("inf")
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
DENSE = Attention("dense", 3, 25, 8, total=70, b=2, queries=2, start=(3, 0))
# Its start is before the first key.
EARLY = Attention("early", 1, 8, total=66, start=(-5,))
# Its start is past some of the listed keys.
LATE = Attention("late", 1, 8, total=22, listed=20, start=(12,))
LISTED = Attention("listed", 2, 40, 8, listed=66, queries=2, gaps=True)
# No list entry, head, dimension or column is left over.
FULL = Attention("full", 16, 256, listed=64)
# Values one by one, with a head that the first threadgroup does not take.
HEADS = Attention("heads", 17, 33, 7, listed=5)
# A head and a column are left over.
COLUMNS = Attention("columns", 17, 257, listed=5)
# Chunks that are left over by blocks of scores and of values.
CHUNKS = Attention("chunks", 1, 264, listed=9)
# The second of three splits has no keys.
EMPTY = Attention("empty", 3, 8, listed=130, total=140, empty=(3, 128))
# Nothing is listed that a query sees.
NOTHING = Attention("nothing", 2, 8, listed=3, empty=(0, 3))
ONE = Attention("one", 5, 8, listed=1)
# It has more splits than a simdgroup has lanes.
LONG = Attention("long", 1, 8, listed=2180, total=2190)
# The second split has a key for the second query alone.
UNLIKE = Attention("unlike", 1, 8, total=65, queries=2)
# Its sums of values are -0.
TINY = Attention("tiny", 1, 8, total=2, tiny=True)
# The block after that of the infinite value is not whole.
INFINITE_KEY = Attention("infinite key", 1, 24, listed=3, infinite="key")
INFINITE_QUERY = Attention("infinite query", 1, 24, listed=3, infinite="query")
BF16 = Attention("bf16", 1, 8, 16, listed=4, kv_format="bf16")
FP16 = Attention("fp16", 1, 8, 16, listed=4, kv_format="fp16")
FP8 = Attention("fp8", 1, 136, 16, listed=4, kv_format="fp8")
INT8 = Attention("int8", 1, 8, 16, listed=4, kv_format="int8")
# Their rows are read value by value.
ODD_FP8 = Attention("odd fp8", 1, 128, 3, listed=4, kv_format="fp8")
ODD_INT8 = Attention("odd int8", 1, 9, 3, listed=4, kv_format="int8")
CASES = [
    *(
        DENSE,
        EARLY,
        LATE,
        LISTED,
        FULL,
        HEADS,
        COLUMNS,
        CHUNKS,
        EMPTY,
        NOTHING,
        ONE,
        LONG,
        UNLIKE,
        TINY,
        INFINITE_KEY,
        INFINITE_QUERY,
    ),
    *(BF16, FP16, FP8, INT8, ODD_FP8, ODD_INT8),
]

# Each has a name, a case and a change, whose text has @old@new@ where it differs. Where the text
# occurs several times, a number follows that tells which.
BARRIER = "@  threadgroup_barrier(mem_flags::mem_threadgroup);\n@@"
SPLIT = [
    *((f"barrier {i}", LISTED, BARRIER, i) for i in range(1, 8)),
    ("barrier 8", CHUNKS, BARRIER, 8),
    # cached_rows.h
    ("columns of a latent", HEADS, "column <@@=@ rank) {", 0),
    ("columns of a latent, one less", HEADS, "column < rank@@ - 1@) {", 0),
    ("row of a key", HEADS, "latents@ + key * latent_stride@@))[column]"),
    ("RoPE row of a key", HEADS, "ropes@ + key * rope_stride@@))"),
    ("columns of a RoPE key", HEADS, "[column - rank@@ + 1@]"),
    ("columns of a code", ODD_FP8, "column <@@=@ rank) {", 1),
    ("columns of a code, one less", ODD_FP8, "column < rank@@ - 1@) {", 1),
    ("row of codes", ODD_FP8, "row = latents@ + key * latent_stride@@;"),
    ("scales of a row", ODD_FP8, "(rank + tile@ - 1@@) / tile"),
    ("scales of a row, one less", ODD_INT8, "scales(int) {\n    return @1@0@;"),
    ("scale of a column", ODD_FP8, "return @column@(column + 1)@ / tile"),
    ("sign of a code", ODD_FP8, "ushort(code@ & 0x80@@) << 8"),
    ("magnitude of a code", ODD_FP8, "ushort(code@ & 0x7f@@) << 7"),
    ("sign of an integer", ODD_INT8, "static_cast<float>(@static_cast<int8_t>(code)@code@)"),
    ("sequence of latents", DENSE, "latents@ + b * params.latent_sequence@@,"),
    ("sequence of RoPE keys", DENSE, "ropes@ + b * params.rope_sequence@@,"),
    ("start of a sequence", DENSE, "start[@b@0@]"),
    ("start before the first key", EARLY, "clamp(start[b], @0@-9@, params.keys)"),
    ("last visible key", LISTED, "params.queries + query + @1@2@)"),
    ("last visible key, one less", LISTED, "params.queries + query@ + 1@@)"),
    # row_chunks.h
    ("units", LISTED, "i < words / each@@ - 1@; i++"),
    ("unit", LISTED, "from)[@i@0@];\n      GLM_UNROLL"),
    ("words of a unit", LISTED, "j < each@@ - 1@; j++", 1),
    ("word of a unit", LISTED, "to[i * each@ + j@@]"),
    ("word of a chunk", LISTED, "to[@i * each + @@j]"),
    ("words", INT8, "i < words@@ - 1@; i++"),
    ("word", INT8, "to[i] = ((const device uint*)from)[@i@0@];"),
    ("value of a word", LISTED, "return as_type<float>(words[@i@0@]);"),
    ("halves", FP16, "words[i@ / 2@@] >>"),
    ("half of a word", FP16, ">> (i % 2 * @16@0@)"),
    ("bfloats", BF16, "word = words[i@ / 2@@];"),
    ("bfloat of a word", BF16, "as_type<float>(i % 2 == @0@1@ ? word"),
    ("high bfloat", BF16, "word << 16 : word@ & 0xffff0000u@@)"),
    ("values of a row", HEADS, "i < kChunk@@ - 1@; i++) {\n      values[i] = column"),
    ("end of a row", HEADS, "values[i] = column + i < end@@ + 1@ ?"),
    ("end of a row, one less", HEADS, "values[i] = column + i < end@@ - 1@ ?"),
    ("value of a row", HEADS, "rows.value(row, column@ + i@@) :"),
    ("values cleared", HEADS, "i < kChunk@@ - 1@; i++) {\n      values[i] = 0"),
    ("value", HEADS, "return values[@i@0@];"),
    ("latents", LISTED, "rope = column >@=@@ rows.rank;", 0),
    ("row of a RoPE chunk", LISTED, "rows.ropes@ + row * rows.rope_stride@@;"),
    ("column of a RoPE chunk", BF16, "from + @(column - rows.rank)@0@ * int(sizeof(U))"),
    ("row of a chunk", LISTED, "rows.latents@ + row * rows.latent_stride@@;\n      load"),
    ("column of a chunk", LISTED, "from@ + column * int(sizeof(T))@@, words)"),
    ("words cleared", CHUNKS, "i < latent_words@@ - 1@; i++"),
    ("keys cleared", INFINITE_KEY, "@    key.clear();\n@@    if"),
    ("queries cleared", INFINITE_QUERY, "@    query.clear();\n@@    if"),
    ("row of a packed chunk", FP8, "from = rows.latents@ + row * rows.latent_stride@@;\n    const"),
    ("scales of a packed row", FP8, "(const device float*)(from@ + rows.rank@@);"),
    ("packed latents", FP8, "rope = column >@=@@ rows.rank;", 1),
    ("end of the scales", FP8, "end = scales@ + Code::scales(rows.rank)@@;"),
    ("packed RoPE chunk", FP8, "(const device uint8_t*)end@ + (column - rows.rank) * 2@@, words"),
    ("packed chunk", FP8, "from@ + column@@, words);"),
    ("scale of a chunk", FP8, "scale = scales[@Code::scale_of(column)@0@];"),
    ("codes of a word", INT8, "uint8_t(words[i@ / 4@@] >>"),
    ("code of a word", INT8, ">> (i % 4 * @8@0@)"),
    ("scale of a code", INT8, "(i % 4 * 8)))@ * scale@@;"),
    # listed_keys.h
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
    ("entries of a split", LISTED, "i < kSplit@@ + 1@; i += kLanes"),
    ("entries of a split, one less", LISTED, "i < kSplit@@ - kLanes@; i += kLanes"),
    ("first entry", LISTED, "token, @first + @@i + lane)"),
    ("entry of the second half", LISTED, "token, first@ + i@@ + lane)"),
    ("entry of a lane", LISTED, "token, first + i@ + lane@@)"),
    ("a listed key", LISTED, "listed = key >@=@@ 0;"),
    ("places of the second half", LISTED, "place = @count + @@simd"),
    ("place of a key", LISTED, "place = count@ + simd_prefix_exclusive_sum(listed)@@;"),
    ("keys that are listed", LISTED, "if (@listed != 0 && @@simdgroup == 0"),
    ("one simdgroup lists", LISTED, "listed != 0@ && simdgroup == 0@@) {"),
    ("count of the keys", LISTED, "count += @simd_sum(listed)@kLanes@;"),
    # load_dims and store_dims
    ("own row", LISTED, "return @(simdgroup * kLanes + lane)@lane@ / kParts;"),
    ("rows of a thread", LISTED, "(simdgroup * kLanes + lane)@ / kParts@@;"),
    ("own part", LISTED, "return @lane % kParts@0@ * kChunk;"),
    ("dimensions of the block", LISTED, "column = @first + @@own_part(), end"),
    ("part of the block", LISTED, "column = first@ + own_part()@@, end"),
    ("keys mask", LISTED, "if (listed >@=@@ 0 && column"),
    ("keys mask, none", LISTED, "if (@listed >= 0 && @@column"),
    ("dimensions of a key", CHUNKS, "listed >= 0 && column < end@@ + 1@) {"),
    ("dimensions of a key, one chunk less", CHUNKS, "listed >= 0 && column < end@@ - kChunk@) {"),
    ("dimensions of a key, mask", CHUNKS, "listed >= 0@ && column < end@@) {"),
    ("heads mask", HEADS, "if (own_row() < heads@@ + 1@ &&"),
    ("heads mask, one less", LISTED, "if (own_row() < heads@@ - 1@ &&"),
    ("heads mask, none", HEADS, "if (@own_row() < heads && @@column"),
    ("dimensions of a head", CHUNKS, "own_row() < heads && column < end@@ + 1@) {"),
    (
        "dimensions of a head, one chunk less",
        CHUNKS,
        "own_row() < heads && column < end@@ - kChunk@) {",
    ),
    ("dimensions of a head, mask", CHUNKS, "own_row() < heads@ && column < end@@) {"),
    ("key of a thread", LISTED, "key.load(rows, @listed@0@, column"),
    ("head of a thread", LISTED, "query.load(queries, @own_row()@0@, column"),
    ("row in a block", LISTED, "to = block@ + own_row() * kPitch@@ + own_part()"),
    ("part in a block", LISTED, "own_row() * kPitch@ + own_part()@@;"),
    ("keys after heads", LISTED, "store(key, to@ + kHeads * kPitch@@)"),
    ("heads of a block", FULL, "if (own_row() < kHeads@@ + 1@) {"),
    ("heads of a block, one less", FULL, "if (own_row() < kHeads@@ - 1@) {"),
    ("fours of a chunk", LISTED, "i < kChunk@@ - 4@; i += 4"),
    ("place of a four", LISTED, "(threadgroup float4*)(to@ + i@@) ="),
    ("value 0 of a four", LISTED, "chunk.value(@i@0@),"),
    ("value 1 of a four", LISTED, "chunk.value(i@ + 1@@),"),
    ("value 2 of a four", LISTED, "chunk.value(i@ + 2@@),"),
    ("value 3 of a four", LISTED, "chunk.value(i@ + 3@@));"),
    # dot
    ("keys of a simdgroup", LISTED, "(@simdgroup * kOwnKeys + @@i) * kWide"),
    ("keys of a thread", LISTED, "(simdgroup * kOwnKeys@ + i@@) * kWide"),
    ("keys of a lane", LISTED, "kWide@ + lane % kWide@@;\n"),
    ("scores zeroed", FULL, "i < kScores@@ - 1@; i++) {\n      scores[i] = 0"),
    ("keys listed", LISTED, "listed = own_row() < count@@ + 1@ ?"),
    ("keys listed, one less", LISTED, "listed = own_row() < count@@ - 1@ ?"),
    ("halves of the memory", LISTED, "other = memory@ + kDimsBlock@@;"),
    ("first block", LISTED, "load_dims(@0@kDepth@, listed"),
    ("blocks, one less", HEADS, "first < queries.rank@@ - kDepth@; first"),
    ("blocks, one dimension less", DENSE, "first < queries.rank@@ - 1@; first"),
    ("next block", LISTED, "load_dims(@first@0@, listed"),
    ("block of the dots", LISTED, "dot_block(@block@other@, scores);\n      store"),
    ("half of the next block", LISTED, "store_dims(@other@block@, query"),
    (
        "halves change places",
        LISTED,
        "done = block;\n      block = @other@block@;\n      other = done;\n    }\n    dot",
    ),
    ("last block", LISTED, "    }\n@    dot_block(block, scores);\n@@  }"),
    ("head of a lane", LISTED, "q = block@ + lane / kWide * kPitch@@;"),
    ("keys of a block", LISTED, "k = block@ + kHeads * kPitch@@;"),
    ("dimensions", LISTED, "d < kDepth@@ - 4@; d += 4"),
    ("heads of a thread", FULL, "i < kOwnHeads@@ - 1@; i++) {\n        a[i]"),
    ("head of a dot", FULL, "(q@ + i * kTall * kPitch@@ + d)"),
    ("dimension of a head", LISTED, "(q + i * kTall * kPitch@ + d@@)"),
    ("keys of a dot", LISTED, "i < kOwnKeys@@ - 1@; i++) {\n        b[i]"),
    ("key of a dot", LISTED, "(k + own_key(@i@0@) * kPitch"),
    ("dimension of a key", LISTED, "own_key(i) * kPitch@ + d@@)"),
    ("products", FULL, "i < 4 * kScores@@ - 1@; i++"),
    ("dimension of a product", LISTED, "c = @i / kScores@0@, at"),
    ("head of a product", FULL, "fma(a[@at / kOwnKeys@0@][c]"),
    ("key of a product", LISTED, "b[@at % kOwnKeys@0@][c]"),
    # softmax
    ("maxima", FULL, "i < kMlaSimdgroups@@ - 1@; i++"),
    ("maxima of a simdgroup", FULL, "most[@i * kHeads + @@head]"),
    ("maximum of a head", FULL, "most[i * kHeads@ + head@@]"),
    ("larger", FULL, "return b > a ? @b@a@ : a;"),
    ("heads of the maxima", FULL, "i < kOwnHeads@@ - 1@; i++) {\n      float largest"),
    ("keys of a maximum", LISTED, "j < kOwnKeys@@ - 1@; j++"),
    ("scale", LISTED, "kOwnKeys + j]@ * scale@@;"),
    ("a scaled score", LISTED, "scores[i * kOwnKeys + j] = @s@scores[i * kOwnKeys + j]@;"),
    ("last key of a maximum", ONE, "largest = own_key(j) < count@@ + 1@ ?"),
    ("last key of a maximum, one less", ONE, "largest = own_key(j) < count@@ - 1@ ?"),
    ("keys of a maximum, mask", ONE, "largest = @own_key(j) < count@true@ ?"),
    ("lanes of a maximum", FULL, "step < kWide@@ / 2@; step *= 2"),
    ("neighbouring lanes", FULL, "ushort step = @1@2@; step"),
    ("one lane tells", LISTED, "if (@lane % kWide == 0@true@) {"),
    ("maximum of a simdgroup", FULL, "most[@simdgroup * kHeads + @@y"),
    ("maximum of a lane", FULL, "kHeads + @y + @@i * kTall] ="),
    ("maximum of a lane's heads", FULL, "kHeads + y@ + i * kTall@@] ="),
    ("powers", FULL, "i < kScores@@ - 1@; i++) {\n      const int head"),
    ("head of a power", FULL, "head = y@ + i / kOwnKeys * kTall@@, key"),
    ("lane of a power", FULL, "head = @y + @@i / kOwnKeys"),
    ("key of a power", LISTED, "key = own_key(@i % kOwnKeys@0@);"),
    ("place of a power", LISTED, "p[key * kHeads@ + head@@] = key"),
    ("keys of a power", LISTED, "= key < count@@ + 1@\n"),
    ("keys of a power, one less", LISTED, "= key < count@@ - 1@\n"),
    ("head of a maximum", FULL, "exp_negative(scores[i] - most_of(@head@0@))"),
    ("one simdgroup sums", FULL, "if (@simdgroup == 0 && @@lane < heads) {"),
    ("heads of a sum", LISTED, "&& lane < heads@@ + 1@) {"),
    ("heads of a sum, one less", LISTED, "&& lane < heads@@ - 1@) {"),
    ("heads of a sum, none", LISTED, "simdgroup == 0@ && lane < heads@@) {"),
    ("keys of a sum", FULL, "key < kSplit@@ + 1@; key++"),
    ("keys of a sum, one less", FULL, "key < kSplit@@ - 1@; key++"),
    ("head of a sum", FULL, "p[key * kHeads@ + lane@@];"),
    # values
    ("key of a simdgroup", LISTED, "key = first_key@ + simdgroup@@, end"),
    ("first key of a block", LISTED, "key = @first_key + @@simdgroup, end"),
    ("columns of a pass", CHUNKS, "column = @first_column + @@lane * kChunk"),
    ("columns of a lane", LISTED, "column = first_column@ + lane * kChunk@@;"),
    ("keys of a block", LISTED, "if (key < count@@ + 1@ && column"),
    ("keys of a block, one less", LISTED, "if (key < count@@ - 1@ && column"),
    ("keys of a block, mask", LISTED, "if (@key < count && @@column < end) {"),
    ("columns of values", LISTED, "key < count && column < end@@ + 1@) {"),
    ("columns of values, one chunk less", LISTED, "key < count && column < end@@ - kChunk@) {"),
    ("columns of values, mask", LISTED, "key < count@ && column < end@@) {"),
    ("value's key", LISTED, "chunk.load(rows, list[@key@0@], column"),
    ("sums zeroed", FULL, "i < kSums@@ - 1@; i++) {\n      sums[i] = 0"),
    ("blocks after weights", LISTED, "block = memory@ + kWeights@@;"),
    ("halves of the blocks", LISTED, "other = block@ + kValuesBlock@@;"),
    ("place of a simdgroup", LISTED, "own = @simdgroup * kColumns + @@lane * kChunk;"),
    ("place of a lane", LISTED, "kColumns@ + lane * kChunk@@;\n    load"),
    ("first block of values", LISTED, "load_values(@0@kKeys@, first, chunk)"),
    ("last block of values", HEADS, "key + kKeys < count@@ - 1@; key"),
    ("next block of values", LISTED, "load_values(key@ + kKeys@@, first, chunk)"),
    ("block that is weighed", LISTED, "weigh<true>(key, @block@other@, sums)"),
    ("keys that are weighed", LISTED, "weigh<true>(@key@0@, block, sums)"),
    ("half of the next values", LISTED, "store(chunk, @other@block@ + own);"),
    (
        "halves of values change places",
        LISTED,
        "done = block;\n      block = @other@block@;\n      other = done;\n    }\n    weigh",
    ),
    ("last keys", LISTED, "@    weigh<false>(key, block, sums);\n@@    thread"),
    ("last keys, whole", TINY, "weigh<@false@true@>(key, block, sums)"),
    ("weights of a block", LISTED, "memory@ + first * kHeads@@ + lane / kWide"),
    ("weights of a lane", FULL, "first * kHeads@ + lane / kWide * kOwnHeads@@;"),
    ("own columns", LISTED, "v = block@ + own_column(0)@@;"),
    ("keys weighed", FULL, "key < kKeys@@ - 1@; key++"),
    ("keys weighed, last", TINY, "whole || first + key < count@@ + 1@)"),
    ("keys weighed, one less", LISTED, "whole || first + key < count@@ - 1@)"),
    ("weights of a key", LISTED, "float4*)(p@ + key * kHeads@@);"),
    ("fours of columns", FULL, "i < kOwnColumns / 4@@ - 1@; i++"),
    ("values of a key", LISTED, "(v@ + key * kColumns@@ + i * 4 * kWide)"),
    ("four of columns", FULL, "kColumns@ + i * 4 * kWide@@)"),
    ("sums", FULL, "i < kSums@@ - 1@; i++) {\n          const int column"),
    ("head of a sum", FULL, "fma(a[@i / kOwnColumns@0@], b"),
    ("four of a sum", FULL, "b[@column / 4@0@][column"),
    ("column of a four", FULL, "[column@ % 4@ / 4@], sums"),
    ("column of a simdgroup", FULL, "return @simdgroup * kWide * kOwnColumns + @@(four"),
    ("column of a second four", FULL, "(@four * kWide + @@lane % kWide) * 4"),
    ("column of a lane", FULL, "(four * kWide@ + lane % kWide@@) * 4"),
    ("sums stored", FULL, "i < kSums@@ - 4@; i += 4"),
    ("head stored", FULL, "head = @lane / kWide * kOwnHeads + @@i / kOwnColumns;"),
    ("heads of a lane", FULL, "kOwnHeads@ + i / kOwnColumns@@;"),
    ("pass stored", CHUNKS, "column = @first + @@own_column("),
    ("four stored", FULL, "own_column(@i % kOwnColumns / 4@0@);"),
    ("heads stored", LISTED, "if (head >@=@@ heads ||"),
    ("heads stored, one less", LISTED, "if (head >= heads@@ - 1@ ||"),
    ("heads stored, mask", LISTED, "if (@head >= heads || @@column"),
    ("columns stored", LISTED, "|| column >@=@@ rows.rank) {"),
    ("columns stored, one less", COLUMNS, "|| column >= rows.rank@@ - 1@) {"),
    ("columns stored, mask", LISTED, "if (head >= heads@ || column >= rows.rank@@) {"),
    ("place of a head", LISTED, "to = o@ + head * rows.rank@@ + column;"),
    ("place of a column", LISTED, "rows.rank@ + column@@;\n      if constexpr"),
    ("value 1 stored", LISTED, "float4(sums[i], sums[i@ + 1@@],"),
    ("value 2 stored", LISTED, "sums[i@ + 2@@], sums[i + 3])"),
    ("value 3 stored", LISTED, "sums[i + 2], sums[i@ + 3@@])"),
    ("values stored", HEADS, "j < 4@@ - 1@; j++"),
    ("last columns", COLUMNS, "if (column + j < rows.rank@@ + 1@) {"),
    ("last columns, one less", COLUMNS, "if (column + j < rows.rank@@ - 1@) {"),
    ("last columns, mask", COLUMNS, "if (@column + j < rows.rank@true@) {"),
    ("value stored", HEADS, "to[j] = sums[i@ + j@@];"),
    ("column stored", HEADS, "to[@j@0@] = sums"),
    # mla_split
    ("heads of a threadgroup", HEADS, "min(kHeads, params.heads - head@@ + 1@)"),
    ("heads of a threadgroup, one less", HEADS, "min(kHeads, params.heads - head@@ - 1@)"),
    ("heads left", HEADS, "@min(kHeads, params.heads - head)@kHeads@,"),
    ("heads at once", HEADS, "@min(kHeads, params.heads - head)@params.heads - head@,"),
    ("blocks of heads", HEADS, "head = tid.y@ * kHeads@@;"),
    ("dispatch's token", LISTED, "token = params.first_token@ + tid.z@@, head"),
    ("query of a sequence", DENSE, "params.rows, b, token@ % queries@@)"),
    ("sequence of a token", DENSE, "b = token@ / queries@@;"),
    ("entries of a split", LISTED, "token, tid.x@ * kSplit@@, list"),
    ("passes, one less", COLUMNS, "column < rank@@ - 1@; column += kColumns"),
    ("query of a token", LISTED, "q + (@size_t(token) * params.heads + @@head) * dims"),
    ("query of a head", HEADS, "params.heads@ + head@@) * dims"),
    ("results of a split", LISTED, "(size_t(tid.z) * params.splits@ + tid.x@@) * params.heads"),
    ("results of a token", LISTED, "(@size_t(tid.z) * params.splits + @@tid.x) * params.heads"),
    ("results of a head", HEADS, "params.heads@ + head@@;\n  const MlaSplit"),
    ("maxima of a split", LISTED, "params.scale, m@ + first@@, l"),
    ("sums of a split", LISTED, "m + first, l@ + first@@);"),
    ("values of a split", LISTED, "part.values(column, o@ + first * rank@@)"),
]
COMBINE = [
    ("barrier", LISTED, BARRIER, 0),
    ("splits of a maximum", LONG, "s < count@@ + 1@; s += kLanes"),
    ("splits of a maximum, one less", EMPTY, "s < count@@ - 1@; s += kLanes"),
    ("more splits of a maximum", LONG, "s < count@@ / 2@; s += kLanes"),
    ("splits of a lane", LONG, "int s = thread_id@ % kLanes@@; s <"),
    ("split of a maximum", EMPTY, "at = @size_t(s) * heads@0@;\n      largest"),
    ("maximum of the lanes", EMPTY, "largest = @simd_max(largest)@largest@;"),
    ("weights", EMPTY, "s < count@@ + 1@; s += threads"),
    ("weights, one less", EMPTY, "s < count@@ - 1@; s += threads"),
    ("weights of a thread", LONG, "s = @thread_id@0@; s <"),
    ("split of a weight", EMPTY, "at = @size_t(s) * heads@0@;\n      weights"),
    ("weight of an empty split", NOTHING, "m[at] - largest) : @-1.0f@0.0f@;"),
    ("weight of any split", EMPTY, "weights[s] =\n          @l[at] != 0@true@ ?"),
    ("splits of a sum", EMPTY, "own[i] = first + i < count@@ + 1@ ?"),
    ("splits of a sum, one less", EMPTY, "own[i] = first + i < count@@ - 1@ ?"),
    ("splits of a sum, none", EMPTY, "own[i] = @first + i < count@true@ ?"),
    ("more splits of a sum", LONG, "first < count@@ - kSplitsAtOnce@; first"),
    ("weight of a split", EMPTY, "weights[first@ + i@@]"),
    ("weight of more splits", LONG, "weights[@first + @@i]"),
    ("splits at once", LONG, "i < kSplitsAtOnce@@ - 1@; i++) {\n        own"),
    ("splits added", LONG, "i < kSplitsAtOnce@@ - 1@; i++) {\n        if"),
    ("empty splits read", EMPTY, "if (@!(own[i] < 0)@true@) {\n          parts"),
    ("empty splits added", EMPTY, "if (@!(own[i] < 0)@true@) {\n          value"),
    ("a NaN of a split", INFINITE_QUERY, "if (@!(own[i] < 0)@own[i] >= 0@) {\n          value"),
    ("split of a value", EMPTY, "x[size_t(first@ + i@@) * step]"),
    ("more splits of a value", LONG, "x[size_t(@first + @@i) * step]"),
    ("step of a value", EMPTY, "x[size_t(first + i)@ * step@@]"),
    ("columns", LISTED, "i < rank / each@@ + 1@; i += threads"),
    ("columns, one less", LISTED, "i < rank / each@@ - 1@; i += threads"),
    ("columns one by one", HEADS, "i < rank / each@@ - 1@; i += threads"),
    ("columns of a thread", LISTED, "sum(x@ + i@@, heads"),
    ("row of a split", EMPTY, "heads * @(rank / each)@rank@)"),
    ("columns of a vector", LISTED, "j < each@@ - 1@; j++"),
    ("column of a vector", LISTED, "y.set(i * each@ + j@@,"),
    ("vector of a thread", LISTED, "y.set(@i * each + @@j,"),
    ("part of a vector", LISTED, "return value[@i@0@];"),
    ("a query without keys", NOTHING,
        "@total != 0 ? part_of(value, j) / total : 0.0f@part_of(value, j) / total@"),
    ("total", LISTED, "part_of(value, j)@ / total@@ : 0.0f"),
    ("vectors", HEADS, "if (rank % @4@1@ == 0) {"),
    ("results of a split", LISTED, "o@ + first * rank@@,"),
    ("maxima of a head", LISTED, "m@ + first@@,\n      l"),
    ("sums of a head", UNLIKE, "l@ + first@@,\n      weights"),
    ("sums in the total", LISTED, "splits.sum(l@ + first@@, params.heads)"),
    ("heads in the total", EMPTY, "splits.sum(l + first, @params.heads@0@)"),
    # This read would change nothing.
    ("maximum of an empty split", EMPTY, "largest = @l[at] != 0 ? larger(largest, m[at]) : largest"
        "@larger(largest, m[at])@;"),
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
    ("mla_split", "blocks", LISTED, "first < queries.rank@@ + 1@; first"),
    # The block past the last has no keys.
    ("mla_split", "blocks of values", FULL, "key + kKeys < count@@ + 1@; key"),
    # The pass past the last has no columns.
    ("mla_split", "passes", FULL, "column < rank@@ + 1@; column += kColumns"),
    # Of two that are equal it does not matter which is taken.
    ("mla_split", "as large", FULL, "return b >@@=@ a ? b : a;"),
]

MUTATIONS = [
    Mutation(name, case, kernel, *change)
    for kernel, table in (("mla_split", SPLIT), ("mla_combine", COMBINE))
    for name, case, *change in table
]
SAME = [Mutation(name, case, kernel, *change) for kernel, name, case, *change in EQUIVALENT]
mla = Mutants(MUTATIONS, SAME)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shader_itself_is_clean(case):
    launches = mla.right(case).launches
    assert all(launch.report.clean for launch in launches), launches
    with cpu():
        expected = case.run()
    there = np.frombuffer(launches[1].outputs[3], np.float32).reshape(expected.shape)
    assert_same_bits(mx.array(there), expected)


@pytest.mark.parametrize("mutation", mla.params(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation):
    assert mla.caught_by(mutation)


@pytest.mark.parametrize("mutation", mla.params(SAME), ids=str)
def test_equivalent_change_gives_the_same(mutation):
    assert not mla.caught_by(mutation)
