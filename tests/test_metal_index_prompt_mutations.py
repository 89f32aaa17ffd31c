"""Every barrier, bound and mask of a prompt's indexer is needed, as test_metal_mutations says."""

import pytest
from metal_mutants import Mutants, Mutation
from test_metal_mutations_indexer import BARRIER, Indexing

# Three tiles of queries; heads and dimensions of several blocks, which end within a chunk.
TILES = Indexing("tiles", 300, 40, heads=3, dim=43, queries=70, factor=0.7)
# The second sequence begins within the second tile of keys, past all of the first.
STARTS = Indexing("starts", 300, 20, heads=2, b=2, queries=33, start=(0, 140))
# One tile shows its last key, another its first, and that to the last query alone.
TILE_EDGES = Indexing(
    "tile edges", 385, 40, heads=2, dim=128, queries=32, start=(127,), loud=(127, 384)
)
# The first tile sees as many keys as are wanted, and one more.
ALL, NOT_ALL = (Indexing(f"all of {k}", 100, k, queries=70) for k in (62, 61))
CASES = [TILES, STARTS, TILE_EDGES, ALL, NOT_ALL]

CHANGES = [
    ("barrier after queries", TILES, BARRIER, 0),
    ("barrier after products", TILES, BARRIER, 1),
    ("barrier after words", TILES, BARRIER, 2),
    ("chunk's query", TILES, "return at / kBlockChunks@ % kTileQueries@@;"),
    ("chunk of a block", TILES, "kBlockChunks +\n        at@ % kBlockChunks@@;"),
    ("block of a chunk", TILES, "return @at / (kBlockChunks * kTileQueries) * kBlockChunks +@@\n"),
    ("heads", TILES, "if (@head < heads && @@query < count && column < dim)"),
    ("queries", TILES, "if (head < heads && @query < count && @@column < dim)"),
    ("dimensions of queries", STARTS, "query < count@ && column < dim@@) {"),
    ("end of a query", TILES, "column, dim@@ + 1@);\n      } else {\n        queries"),
    ("head of a query", TILES, "query * heads@ + head@@, column"),
    ("query of a row", TILES, "load(rows, @query * heads@0@ + head"),
    ("queries that are none", TILES, "@queries[i].clear();@@"),
    ("heads of weights", TILES, "weight = @head < heads && @@thread_id"),
    ("queries of weights", TILES, "weight = head < heads@ && thread_id < count@@\n"),
    ("weight of a query", TILES, "weights[@thread_id * heads + @@head]"),
    ("weight of a head", TILES, "weights[thread_id * heads@ + head@@]"),
    ("block stored", TILES, "first =\n          @chunk / kBlockChunks * kBlockDims + @@chunk"),
    ("chunk stored", TILES, "kBlockDims@ + chunk % kBlockChunks * 2@@;"),
    ("dimension of an eight", TILES, "d = first@ + j / 2 * kSide@@ + j"),
    ("neighbouring dimension", TILES, "j / 2 * kSide@ + j % 2@@;"),
    ("query stored", TILES, "kQueryPitch@ + query_of(at)@@]"),
    ("value stored", TILES, "queries[i].value(@j@0@)"),
    ("weights stored", TILES, "if (@thread_id < kTileQueries@true@) {"),
    ("factor of weights", TILES, "product(weight, @weight_scale@1.0f@)"),
    ("eight keys", TILES, "key + i / kBlocks * @kSide@0@ + matrix_row(lane)"),
    ("key of a row", TILES, "kSide@ + matrix_row(lane)@@;\n    const int column"),
    ("block of keys", TILES, "column =\n        @i % kBlocks * kBlockDims + @@matrix_column"),
    ("chunk of keys", TILES, "kBlockDims@ + matrix_column(lane) / 2 * kChunk@@;"),
    ("keys before the start", STARTS, "if (@row >= visible.low && @@row < visible.high"),
    ("keys past the end", TILES, "row >= visible.low@ && row < visible.high@@ &&"),
    ("dimensions of keys", STARTS, "row < visible.high@ && column < dim@@) {"),
    ("end of a key", TILES, "column, dim@@ + 1@);\n    } else"),
    ("keys that are none", TILES, "@chunk.clear();@@"),
    ("value of a key", TILES, "chunk.value(2 * j@ + 1@@)"),
    ("matrix of a key", TILES, "keys[@i * kBlockEights + @@j] ="),
    ("dots begun", TILES, "dots[i] = float2(@0.0f@1.0f@)"),
    ("blocks multiplied", TILES, "if (first / kBlockEights * kBlockDims < dim@@ - 15@)"),
    ("all eights", TILE_EDGES, "first < kDimEights@@ - kSumEights@; first"),
    ("parts begun", TILES, "part[i] = float2(@0.0f@1.0f@)"),
    ("eights of a part", TILES, "eight < first + kSumEights@@ - 1@; eight"),
    ("rows of an eight", TILES, "(@eight * kSide + @@matrix_row(lane)) * kQueryPitch"),
    ("eights of queries", TILES, "(from + i * @kSide@0@)"),
    ("keys multiplied", TILES, "keys[@j * kDimEights + @@eight]"),
    ("sums of queries", TILES, "part[j * kQueryEights@ + i@@]);"),
    ("sums of parts", TILES, "dots[i] @+@@= part[i]"),
    ("eight of a weight", TILES, "query = @i % kQueryEights * kSide + @@column"),
    ("weight of a score", TILES, "weights[query@ + j@@]"),
    ("positive products", TILES, "@relu(dots[i][j] * scale)@(dots[i][j] * scale)@, scores"),
    ("scale", TILES, "relu(dots[i][j]@ * scale@@)"),
    ("queries of a tile", TILES, "count = @min(kTileQueries, params.count - row)@kTileQueries@;"),
    ("first query", TILES, "query = params.first_query@ + row@@;"),
    ("last query", TILES, "params.b, query + count@ - 1@@);"),
    ("last query, one less", TILES, "params.b, query + count - @1@2@);"),
    ("all are wanted", ALL, "visible.high - visible.low <@=@@ params.top_k"),
    ("one more than wanted", NOT_ALL, "visible.high - visible.low <= params.top_k@@ + 1@)"),
    ("words of a tile", TILES, "words += @size_t(row) * params.columns + @@key;"),
    ("words of keys", TILES, "params.columns@ + key@@;"),
    ("lists of a tile", TILES, "lists += @first_list(row, params.columns) + @@tid.x"),
    ("lists of keys", TILES, "params.columns)@ + tid.x * kTileLists * kListWords@@;"),
    ("tile before the start", TILE_EDGES, "key + kTileKeys <= visible.low@@ + 1@ ||"),
    ("hidden tile before the start", STARTS, "if (@key + kTileKeys <= visible.low || @@key"),
    ("tile past the end", TILE_EDGES, "|| key >= visible.high@@ - 1@) {"),
    ("hidden tile past the end", TILES, "visible.low@ || key >= visible.high@@) {"),
    ("empty lists", STARTS, "lists_of_query + list * kListWords]@ = 0@@;"),
    ("empty lists of queries", STARTS, "thread_id < @count * kTileLists@2@) {"),
    ("empty lists of tiles", TILES, "thread_id < count * kTileLists@@ + 1@) {"),
    ("queries of a token", STARTS, "(q + @token@0@ * heads * dim)"),
    ("weights of a token", STARTS, "weights += @token@0@ * heads"),
    ("keys of a simdgroup", TILES, "own_key = key@ + simdgroup * kHeldKeys@@;"),
    ("scores begun", TILES, "scores[i] = float2(@0.0f@1.0f@)"),
    ("first head", TILES, "weights, @0@1@, heads, count, thread_id);"),
    ("next head", TILES, "weights, head@ + 1@@, heads, count, thread_id);"),
    ("heads scored", TILES, "head < heads@@ - 1@; head++"),
    ("key of a word", TILES, "kQueryEights * kSide@ + matrix_row(lane)@@;"),
    ("eight of a word", TILES, "own_key@ + i / 2 / kQueryEights * kSide@@ + matrix_row"),
    ("query of a word", TILES, "matrix_column(lane)@ + i % 2@@;\n    // An"),
    ("words before the start", STARTS, "seen = @at >= visible.low && @@at <="),
    ("words past the end", TILES, "visible.low@ && at <= visible.high - count + own@@;"),
    ("last word", TILES, "at <@=@@ visible.high - count + own;"),
    ("last word, one more", TILES, "visible.high - count + own@@ + 1@;"),
    ("words of a query", TILES, "made[@own * kWordPitch + @@at - key]"),
    ("queries of a simdgroup", TILES, "i < kQueriesOfSimdgroup@@ - 1@; i++"),
    ("query of a simdgroup", TILES, "own = @simdgroup * kQueriesOfSimdgroup + @@i;"),
    ("queries past the last", TILES, "if (@own >= count@false@) {"),
    ("lists written", TILES, "list < kTileLists@@ - 1@; list++"),
    ("words of a list", TILES, "at = @list * kListKeys + @@j * kLanes"),
    ("second word of a lane", TILES, "kListKeys + j * @kLanes@0@ + lane"),
    ("hidden words", TILES, "if (@word[j] != 0@true@) {"),
    ("place of a word", TILES, "words[@size_t(own) * params.columns + @@at]"),
    ("lists of a query", TILES, "lists + @own * lists_of_query + @@list"),
    ("list of a query", TILES, "lists_of_query + list * @kListWords@0@,"),
]  # fmt: skip
MUTATIONS = [Mutation(name, case, "index_prompt", *change) for name, case, *change in CHANGES]
mutants = Mutants(MUTATIONS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_shader_itself_is_clean(case):
    launches = mutants.right(case).launches
    assert all(launch.report.clean for launch in launches), launches


@pytest.mark.parametrize("mutation", mutants.params(MUTATIONS), ids=str)
def test_mutation_is_caught(mutation):
    assert mutants.caught_by(mutation)
