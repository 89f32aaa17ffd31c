// The lightning indexer's scores, with the arithmetic of csrc/attention.h.
#pragma once

#include "index_digits.h"
#include "row_chunks.h"

GLM_CONST int kHeads = 32;  // so many are scored together
GLM_CONST int kDims = 16;   // so many are in threadgroup memory at once
GLM_CONST int kKeyChunks = kDims / kChunk;
// It puts the two chunks of a key in other banks.
GLM_CONST int kKeyPitch = kScoreKeys + 2;

// What a thread loads of a block of keys and heads, for kDims dimensions.
template <typename T, typename R, int unit>
struct ScoreLoads {
  GLM_CONST int chunks = kKeyChunks * kScoreKeys / kScoreThreads;
  GLM_CONST int values = kDims * kHeads / kScoreThreads;
  Chunk<R, unit> keys[chunks];
  float queries[values];

  // Asks for keys [low, high) of the block that begins with `key`, and for
  // queries q [heads, dim], from dimension `first` on. What lies beyond is 0.
  METAL_FUNC void load(
      const thread R& rows,
      const device T* q,
      int key,
      Visible visible,
      int heads,
      int dim,
      int first,
      int thread_id) thread {
    GLM_UNROLL
    for (int i = 0; i < chunks; i++) {
      const int at = thread_id + i * kScoreThreads;
      const int row = key + at / kKeyChunks;
      const int column = first + at % kKeyChunks * kChunk;
      if (row >= visible.low && row < visible.high && column < dim) {
        keys[i].load(rows, row, column, dim);
      } else {
        keys[i].clear();
      }
    }
    GLM_UNROLL
    for (int i = 0; i < values; i++) {
      const int at = thread_id + i * kScoreThreads;
      const int d = first + at % kDims, head = at / kDims;
      queries[i] = d < dim && head < heads
          ? static_cast<float>(q[head * dim + d])
          : 0.0f;
    }
  }

  // Puts them where all threads see them: k [kDims, kKeyPitch] and shared
  // [kDims, kHeads].
  METAL_FUNC void store(
      threadgroup float* k,
      threadgroup float* shared,
      int thread_id) const thread {
    GLM_UNROLL
    for (int i = 0; i < chunks; i++) {
      const int at = thread_id + i * kScoreThreads;
      const int row = at / kKeyChunks, d = at % kKeyChunks * kChunk;
      GLM_UNROLL
      for (int j = 0; j < kChunk; j++) {
        k[(d + j) * kKeyPitch + row] = keys[i].value(j);
      }
    }
    GLM_UNROLL
    for (int i = 0; i < values; i++) {
      const int at = thread_id + i * kScoreThreads;
      shared[at % kDims * kHeads + at / kDims] = queries[i];
    }
  }
};

// Adds the products of kDims dimensions to a thread's dots, of two keys with
// each head. Those past the last dimension are 0, which changes no dot's use.
METAL_FUNC void add_products(
    const threadgroup float* k,
    const threadgroup float4* queries,
    int thread_id,
    thread float* dot) {
  for (int d = 0; d < kDims; d++) {
    const float a = k[d * kKeyPitch + thread_id];
    const float b = k[d * kKeyPitch + thread_id + kScoreThreads];
    GLM_UNROLL
    for (int i = 0; i < kHeads / 4; i++) {
      const float4 four = queries[d * (kHeads / 4) + i];
      GLM_UNROLL
      for (int j = 0; j < 4; j++) {
        const int at = 2 * (4 * i + j);
        dot[at] = fma(four[j], a, dot[at]);
        dot[at + 1] = fma(four[j], b, dot[at + 1]);
      }
    }
  }
}

// Writes words [queries of this dispatch, columns], those of visible keys only,
// and the lists of their first digits, of threadgroups that have any. The grid
// is (blocks of keys, queries). Keys are read in units of so many bytes.
template <typename T, typename R, int unit>
[[kernel, max_total_threads_per_threadgroup(kScoreThreads)]] void index_scores(
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
  threadgroup float k[kDims * kKeyPitch];
  threadgroup float4 queries[kDims * kHeads / 4];
  const int thread_id = simd_gid * kLanes + simd_lid;
  const int query = params.first_query + tid.y, key = tid.x * kScoreKeys;
  const Visible visible = visible_keys(start, params.rows, params.b, query);
  if (key + kScoreKeys <= visible.low || key >= visible.high) {
    return;
  }
  const int dim = params.rows.rank, heads = params.heads;
  const R rows = rows_of<R>(keys, keys, params.rows, params.b);
  const size_t token = size_t(params.b) * params.rows.queries + query;
  q += token * heads * dim;
  weights += token * heads;

  ScoreLoads<T, R, unit> next;
  thread float score[2] = {0, 0};
  for (int head = 0; head < heads; head += kHeads) {
    const int used = min(kHeads, heads - head);
    const device T* block = q + head * dim;
    thread float dot[2 * kHeads];
    GLM_UNROLL
    for (int i = 0; i < 2 * kHeads; i++) {
      dot[i] = 0;
    }
    next.load(rows, block, key, visible, used, dim, 0, thread_id);
    for (int first = 0; first < dim; first += kDims) {
      next.store(k, (threadgroup float*)queries, thread_id);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      // The next dimensions are asked for before these are multiplied.
      next.load(rows, block, key, visible, used, dim, first + kDims, thread_id);
      add_products(k, queries, thread_id, dot);
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    GLM_UNROLL
    for (int h = 0; h < kHeads; h++) {
      if (h < used) {
        const float weight =
            glm_fused::product(weights[head + h], params.weight_scale);
        GLM_UNROLL
        for (int i = 0; i < 2; i++) {
          score[i] = fma(weight, relu(dot[2 * h + i] * params.scale), score[i]);
        }
      }
    }
  }
  thread uint word[2];
  GLM_UNROLL
  for (int i = 0; i < 2; i++) {
    const int at = key + thread_id + i * kScoreThreads;
    const bool seen = at >= visible.low && at < visible.high;
    word[i] = seen ? ordered(score[i]) : 0u;
    if (seen) {
      words[size_t(tid.y) * params.columns + at] = word[i];
    }
  }
  lists += first_list(tid.y, params.columns);
  list_digits(
      word[0],
      word[1],
      lists + (tid.x * kLists + simd_gid) * kListWords,
      simd_lid);
}
