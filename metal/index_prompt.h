// The lightning indexer's scores for a prompt. A threadgroup takes 128 keys
// past 32 queries: its simdgroups hold 16 keys each, and the queries come by a
// head at a time. Products are the matrix units', in their order.
#pragma once

#include "index_digits.h"
#include "matrix_unit.h"
#include "row_chunks.h"

GLM_CONST int kTileQueries = 32;
GLM_CONST int kTileSimdgroups = 8;
GLM_CONST int kTileThreads = kTileSimdgroups * kLanes;
GLM_CONST int kHeldKeys = 16;  // of a simdgroup
GLM_CONST int kTileKeys = kTileSimdgroups * kHeldKeys;
GLM_CONST int kMostDims = 128;

GLM_CONST int kKeyEights = kHeldKeys / kSide;
GLM_CONST int kQueryEights = kTileQueries / kSide;
GLM_CONST int kScores = kKeyEights * kQueryEights;
// A lane reads a chunk of a key, which is its part of four matrices: their
// columns are dealt out to lanes so that each has neighbours.
GLM_CONST int kBlockDims = kSide * kChunk / 2;
GLM_CONST int kBlockEights = kBlockDims / kSide;
GLM_CONST int kBlockChunks = kBlockDims / kChunk;
GLM_CONST int kBlocks = kMostDims / kBlockDims;
GLM_CONST int kDimEights = kMostDims / kSide;
// So many have a sum of their own, which keeps the error small.
GLM_CONST int kSumEights = 2;
static_assert(kBlockEights % kSumEights == 0, "of one block");

// Rows of threadgroup memory begin in unlike banks.
GLM_CONST int kQueryPitch = kTileQueries + 8;
GLM_CONST int kWordPitch = kTileKeys + 4;
GLM_CONST int kTileWords = kMostDims * kQueryPitch;
static_assert(kTileQueries * kWordPitch <= kTileWords, "words fit, too");

GLM_CONST int kListKeys = kScoreKeys / kLists;
GLM_CONST int kTileLists = kTileKeys / kListKeys;
GLM_CONST int kQueriesOfSimdgroup = kTileQueries / kTileSimdgroups;

// What a thread loads of a head: chunks of queries, and, of the first threads,
// a query's weight.
template <typename T, int unit>
struct HeadLoads {
  typedef FloatRows<T, T> Queries;
  GLM_CONST int chunks = kTileQueries * kMostDims / kChunk / kTileThreads;
  Chunk<Queries, unit> queries[chunks];
  float weight;

  // A chunk's place: its query, and its number in the query.
  static METAL_FUNC int query_of(int at) {
    return at / kBlockChunks % kTileQueries;
  }
  static METAL_FUNC int chunk_of(int at) {
    return at / (kBlockChunks * kTileQueries) * kBlockChunks +
        at % kBlockChunks;
  }

  // Asks for `head` of `count` queries, whose rows are [count, heads, dim];
  // what lies beyond is 0.
  METAL_FUNC void load(
      const thread Queries& rows,
      const device float* weights,
      int head,
      int heads,
      int count,
      int thread_id) thread {
    const int dim = rows.rank;
    GLM_UNROLL
    for (int i = 0; i < chunks; i++) {
      const int at = thread_id + i * kTileThreads;
      const int query = query_of(at), column = chunk_of(at) * kChunk;
      if (head < heads && query < count && column < dim) {
        queries[i].load(rows, query * heads + head, column, dim);
      } else {
        queries[i].clear();
      }
    }
    weight = head < heads && thread_id < count
        ? weights[thread_id * heads + head]
        : 0.0f;
  }

  // Puts them where all threads see them: shared [kMostDims, kQueryPitch], with
  // the dimensions in the order of the matrices, and weights [kTileQueries].
  METAL_FUNC void store(
      threadgroup float* shared,
      threadgroup float* weights,
      float weight_scale,
      int thread_id) const thread {
    GLM_UNROLL
    for (int i = 0; i < chunks; i++) {
      const int at = thread_id + i * kTileThreads;
      const int chunk = chunk_of(at);
      const int first =
          chunk / kBlockChunks * kBlockDims + chunk % kBlockChunks * 2;
      GLM_UNROLL
      for (int j = 0; j < kChunk; j++) {
        const int d = first + j / 2 * kSide + j % 2;
        shared[d * kQueryPitch + query_of(at)] = queries[i].value(j);
      }
    }
    if (thread_id < kTileQueries) {
      weights[thread_id] = glm_fused::product(weight, weight_scale);
    }
  }
};

// Reads a simdgroup's keys from `key` on, those that are visible, as matrices
// of eight keys and eight dimensions, [kKeyEights, kDimEights].
template <typename R, int unit>
METAL_FUNC void hold_keys(
    const thread R& rows,
    int key,
    Visible visible,
    int lane,
    thread float2* keys) {
  const int dim = rows.rank;
  GLM_UNROLL
  for (int i = 0; i < kKeyEights * kBlocks; i++) {
    const int row = key + i / kBlocks * kSide + matrix_row(lane);
    const int column =
        i % kBlocks * kBlockDims + matrix_column(lane) / 2 * kChunk;
    thread Chunk<R, unit> chunk;
    if (row >= visible.low && row < visible.high && column < dim) {
      chunk.load(rows, row, column, dim);
    } else {
      chunk.clear();
    }
    GLM_UNROLL
    for (int j = 0; j < kBlockEights; j++) {
      keys[i * kBlockEights + j] =
          float2(chunk.value(2 * j), chunk.value(2 * j + 1));
    }
  }
}

// Adds a head to the scores, matrices of eight keys and eight queries
// [kKeyEights, kQueryEights].
METAL_FUNC void score_head(
    const thread float2* keys,
    const threadgroup float* queries,
    const threadgroup float* weights,
    int dim,
    float scale,
    int lane,
    thread float2* scores) {
  const int column = matrix_column(lane);
  thread float2 dots[kScores];
  GLM_UNROLL
  for (int i = 0; i < kScores; i++) {
    dots[i] = float2(0.0f);
  }
  GLM_UNROLL
  for (int first = 0; first < kDimEights; first += kSumEights) {
    if (first / kBlockEights * kBlockDims < dim) {
      thread float2 part[kScores];
      GLM_UNROLL
      for (int i = 0; i < kScores; i++) {
        part[i] = float2(0.0f);
      }
      GLM_UNROLL
      for (int eight = first; eight < first + kSumEights; eight++) {
        const threadgroup float* from =
            queries + (eight * kSide + matrix_row(lane)) * kQueryPitch + column;
        GLM_UNROLL
        for (int i = 0; i < kQueryEights; i++) {
          const float2 right = *(const threadgroup float2*)(from + i * kSide);
          GLM_UNROLL
          for (int j = 0; j < kKeyEights; j++) {
            multiply_matrices(
                keys[j * kDimEights + eight],
                right,
                part[j * kQueryEights + i]);
          }
        }
      }
      GLM_UNROLL
      for (int i = 0; i < kScores; i++) {
        dots[i] += part[i];
      }
    }
  }
  GLM_UNROLL
  for (int i = 0; i < kScores; i++) {
    const int query = i % kQueryEights * kSide + column;
    GLM_UNROLL
    for (int j = 0; j < 2; j++) {
      scores[i][j] =
          fma(weights[query + j], relu(dots[i][j] * scale), scores[i][j]);
    }
  }
}

// Writes words [queries of this dispatch, columns], those of visible keys only,
// and the lists of their first digits. Queries that see no more keys than are
// wanted may lack theirs. The grid is (blocks of keys, blocks of queries). Keys
// and queries are read in units of so many bytes.
template <typename T, typename R, int unit>
[[kernel, max_total_threads_per_threadgroup(kTileThreads)]] void index_prompt(
    const device T* q [[buffer(0)]],
    const device float* weights [[buffer(1)]],
    const device uint8_t* keys [[buffer(2)]],
    const device int* start [[buffer(3)]],
    device uint* words [[buffer(4)]],
    const constant IndexParams& params [[buffer(5)]],
    device uint* lists [[buffer(6)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
  threadgroup uint4 tile[kTileWords / 4];  // a head's queries, then words
  threadgroup float head_weights[kTileQueries];
  const int simdgroup = simd_gid, lane = simd_lid;
  const int thread_id = simdgroup * kLanes + lane;
  const int key = tid.x * kTileKeys, row = tid.y * kTileQueries;
  const int count = min(kTileQueries, params.count - row);
  const int query = params.first_query + row;
  // What the last query sees, the most of all.
  const Visible visible =
      visible_keys(start, params.rows, params.b, query + count - 1);
  if (visible.high - visible.low <= params.top_k) {
    return;
  }
  words += size_t(row) * params.columns + key;
  lists += first_list(row, params.columns) + tid.x * kTileLists * kListWords;
  const size_t lists_of_query = first_list(1, params.columns);
  if (key + kTileKeys <= visible.low || key >= visible.high) {
    // A neighbour may have keys that are seen.
    if (thread_id < count * kTileLists) {
      const int list = thread_id % kTileLists;
      lists[thread_id / kTileLists * lists_of_query + list * kListWords] = 0;
    }
    return;
  }
  const int dim = params.rows.rank, heads = params.heads;
  const R rows = rows_of<R>(keys, keys, params.rows, params.b);
  const size_t token = size_t(params.b) * params.rows.queries + query;
  const device uint8_t* first =
      (const device uint8_t*)(q + token * heads * dim);
  const FloatRows<T, T> queries = {first, first, dim, dim * long(sizeof(T)), 0};
  weights += token * heads;

  const int own_key = key + simdgroup * kHeldKeys;
  thread float2 held[kKeyEights * kDimEights];
  hold_keys<R, unit>(rows, own_key, visible, lane, held);
  thread float2 scores[kScores];
  GLM_UNROLL
  for (int i = 0; i < kScores; i++) {
    scores[i] = float2(0.0f);
  }
  threadgroup float* shared = (threadgroup float*)tile;
  HeadLoads<T, unit> next;
  next.load(queries, weights, 0, heads, count, thread_id);
  for (int head = 0; head < heads; head++) {
    next.store(shared, head_weights, params.weight_scale, thread_id);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // The next head is asked for before this one is multiplied.
    next.load(queries, weights, head + 1, heads, count, thread_id);
    score_head(held, shared, head_weights, dim, params.scale, lane, scores);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  threadgroup uint* made = (threadgroup uint*)tile;  // [queries, keys]
  GLM_UNROLL
  for (int i = 0; i < kScores * 2; i++) {
    const int at = own_key + i / 2 / kQueryEights * kSide + matrix_row(lane);
    const int own = i / 2 % kQueryEights * kSide + matrix_column(lane) + i % 2;
    // An earlier query sees as many keys less.
    const bool seen = at >= visible.low && at <= visible.high - count + own;
    made[own * kWordPitch + at - key] =
        seen ? ordered(scores[i / 2][i % 2]) : 0u;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < kQueriesOfSimdgroup; i++) {
    const int own = simdgroup * kQueriesOfSimdgroup + i;
    if (own >= count) {
      break;
    }
    GLM_UNROLL
    for (int list = 0; list < kTileLists; list++) {
      thread uint word[2];
      GLM_UNROLL
      for (int j = 0; j < 2; j++) {
        const int at = list * kListKeys + j * kLanes + lane;
        word[j] = made[own * kWordPitch + at];
        if (word[j] != 0) {
          words[size_t(own) * params.columns + at] = word[j];
        }
      }
      list_digits(
          word[0],
          word[1],
          lists + own * lists_of_query + list * kListWords,
          lane);
    }
  }
}
