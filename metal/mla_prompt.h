// Attention over chosen latent rows for a prompt. A threadgroup takes 16 heads
// of a query through its list of keys, 16 of them at a time, with a running
// softmax. A simdgroup owns 64 columns of the latents and 8 of the RoPE keys:
// it reads them once, for the scores and for the values, so no row passes
// through threadgroup memory. Products are the matrix units', in their order.
#pragma once

#include "listed_keys.h"
#include "matrix_unit.h"
#include "row_chunks.h"
#include "softmax_exp.h"

GLM_CONST int kPromptHeads = 16;
GLM_CONST int kPromptKeys = 16;
GLM_CONST int kPromptSimdgroups = 8;
GLM_CONST int kPromptThreads = kPromptSimdgroups * kLanes;
static_assert(kPromptHeads * kPromptKeys == kPromptThreads, "one score each");
static_assert(kPromptKeys <= kLanes, "a head's scores are a simdgroup's");

GLM_CONST int kHeadEights = kPromptHeads / kSide;
GLM_CONST int kKeyEights = kPromptKeys / kSide;
// A lane reads a chunk of a row, which is its part of four matrices: their
// columns are dealt out to lanes so that each has neighbours. A simdgroup owns
// two such blocks of 32 columns.
GLM_CONST int kBlockColumns = kSide * kChunk / 2;
GLM_CONST int kBlockEights = kBlockColumns / kSide;
GLM_CONST int kOwnBlocks = 2;
GLM_CONST int kOwnColumns = kOwnBlocks * kBlockColumns;
GLM_CONST int kOwnEights = kOwnColumns / kSide;

// Rows of threadgroup memory begin in unlike banks.
GLM_CONST int kScorePitch = kPromptHeads + 2;
GLM_CONST int kScoresOfSimdgroup = kPromptKeys * kScorePitch;

template <typename T, typename R, int unit>
struct MlaPrompt {
  R rows;
  const device T* q;  // [heads, rank + rope], of the threadgroup's heads
  int rope;
  int heads;
  int simdgroup;
  int lane;

  METAL_FUNC int own_column(int block) const thread {
    return simdgroup * kOwnColumns + block * kBlockColumns;
  }
  METAL_FUNC bool has(int block) const thread {
    return own_column(block) < rows.rank;
  }
  METAL_FUNC bool has_rope() const thread {
    return simdgroup * kSide < rope;
  }
  METAL_FUNC int rope_column() const thread {
    return rows.rank + simdgroup * kSide;
  }
  METAL_FUNC int end() const thread {
    return rows.rank + rope;
  }

  METAL_FUNC float query(int head, int column) const thread {
    return head < heads && column < end()
        ? static_cast<float>(q[head * end() + column])
        : 0.0f;
  }

  // Reads the queries' columns of this simdgroup, transposed: matrices of 8
  // columns and 8 heads, [kOwnEights + 1, kHeadEights].
  METAL_FUNC void load_queries(thread float2* queries) const thread {
    const int row = matrix_row(lane);
    GLM_UNROLL
    for (int i = 0; i < (kOwnEights + 1) * kHeadEights; i++) {
      const int eight = i / kHeadEights;
      const int head = i % kHeadEights * kSide + matrix_column(lane);
      // Past the latents' end, where keys are 0, a column may be RoPE's.
      const int column = eight < kOwnEights ? own_column(eight / kBlockEights) +
              row / 2 * kChunk + eight % kBlockEights * 2 + row % 2
                                            : rope_column() + row;
      queries[i] = float2(query(head, column), query(head + 1, column));
    }
  }
};

// What a lane holds of eight keys.
template <typename R, int unit>
struct OwnKeys {
  Chunk<R, unit> chunks[kOwnBlocks];
  float2 ropes;

  // Reads the row `key`, which is -1 for none: it is 0 then.
  template <typename M>
  METAL_FUNC void load(const thread M& part, int key) thread {
    const int place = matrix_column(part.lane) / 2 * kChunk;
    GLM_UNROLL
    for (int block = 0; block < kOwnBlocks; block++) {
      const int column = part.own_column(block) + place;
      if (key >= 0 && column < part.rows.rank) {
        chunks[block].load(part.rows, key, column, part.rows.rank);
      } else {
        chunks[block].clear();
      }
    }
    const int column = part.rope_column() + matrix_column(part.lane);
    GLM_UNROLL
    for (int i = 0; i < 2; i++) {
      ropes[i] = key >= 0 && column + i < part.end()
          ? part.rows.value(key, column + i)
          : 0.0f;
    }
  }

  // The matrix of an eight of columns, those of the keys being its rows.
  METAL_FUNC float2 matrix(int eight) const thread {
    const int at = eight % kBlockEights * 2;
    return float2(
        chunks[eight / kBlockEights].value(at),
        chunks[eight / kBlockEights].value(at + 1));
  }
};

// Writes y [tokens, heads, rank]. The grid is (blocks of 16 heads, tokens).
template <typename T, typename R, int unit>
[[kernel, max_total_threads_per_threadgroup(kPromptThreads)]] void mla_prompt(
    const device T* q [[buffer(0)]],
    const device uint8_t* latents [[buffer(1)]],
    const device uint8_t* ropes [[buffer(2)]],
    const device int* selected [[buffer(3)]],
    const device int* start [[buffer(4)]],
    device float* y [[buffer(5)]],
    const constant MlaParams& params [[buffer(6)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
  // The simdgroups' parts of the scores, [keys, heads] each.
  threadgroup float2 parts[kPromptSimdgroups * kScoresOfSimdgroup / 2];
  threadgroup float2 weights[kScoresOfSimdgroup / 2];  // [heads, keys]
  threadgroup float factors[kPromptHeads];
  threadgroup float totals[kPromptHeads];
  threadgroup int list[kSplit];
  const int simdgroup = simd_gid, lane = simd_lid;
  const int token = tid.y, head = tid.x * kPromptHeads;
  const int queries_of_one = params.rows.queries, b = token / queries_of_one;
  const Visible visible =
      visible_keys(start, params.rows, b, token % queries_of_one);
  const int rank = params.rows.rank, rope = params.rows.rope;
  const size_t first_row = size_t(token) * params.heads + head;
  const MlaPrompt<T, R, unit> part = {
      rows_of<R>(latents, ropes, params.rows, b),
      q + first_row * (rank + rope),
      rope,
      min(kPromptHeads, params.heads - head),
      simdgroup,
      lane};
  thread float2 queries[(kOwnEights + 1) * kHeadEights];
  part.load_queries(queries);
  thread float2 sums[kHeadEights * kOwnEights];
  GLM_UNROLL
  for (int i = 0; i < kHeadEights * kOwnEights; i++) {
    sums[i] = float2(0.0f);
  }
  // A thread has the score of one key and one head; threads of a head agree on
  // its largest score and on the sum of its weights.
  const int thread_id = simdgroup * kLanes + lane;
  const int own_head = thread_id / kPromptKeys;
  const int own_key = thread_id % kPromptKeys;
  float most = -INFINITY, total = 0;

  const int entries =
      params.listed > 0 ? params.listed : visible.high - visible.low;
  for (int entry = 0; entry < entries; entry += kSplit) {
    const int count = list_keys(
        selected, params, visible, token, entry, list, simdgroup, lane);
    for (int first = 0; first < count; first += kPromptKeys) {
      thread OwnKeys<R, unit> keys[kKeyEights];
      GLM_UNROLL
      for (int i = 0; i < kKeyEights; i++) {
        const int at = first + i * kSide + matrix_row(lane);
        keys[i].load(part, at < count ? list[at] : -1);
      }
      threadgroup float* own =
          (threadgroup float*)parts + simdgroup * kScoresOfSimdgroup;
      GLM_UNROLL
      for (int i = 0; i < kKeyEights * kHeadEights; i++) {
        const int eight = i / kHeadEights, heads = i % kHeadEights;
        thread float2 score = float2(0.0f);
        GLM_UNROLL
        for (int d = 0; d < kOwnEights; d++) {
          if (part.has(d / kBlockEights)) {
            multiply_matrices(
                keys[eight].matrix(d), queries[d * kHeadEights + heads], score);
          }
        }
        if (part.has_rope()) {
          multiply_matrices(
              keys[eight].ropes,
              queries[kOwnEights * kHeadEights + heads],
              score);
        }
        threadgroup float* to = own +
            (eight * kSide + matrix_row(lane)) * kScorePitch + heads * kSide +
            matrix_column(lane);
        *(threadgroup float2*)to = score;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      float score = 0;
      GLM_UNROLL
      for (int i = 0; i < kPromptSimdgroups; i++) {
        score += ((const threadgroup float*)parts)
            [i * kScoresOfSimdgroup + own_key * kScorePitch + own_head];
      }
      score *= params.scale;
      const bool listed = first + own_key < count;
      float largest = listed ? larger(most, score) : most;
      GLM_UNROLL
      for (ushort step = 1; step < kPromptKeys; step *= 2) {
        largest = larger(largest, simd_shuffle_xor(largest, step));
      }
      const float weight =
          listed ? glm_fused::exp_negative(score - largest) : 0.0f;
      // Before the first keys there is nothing to scale.
      const float factor =
          total > 0 ? glm_fused::exp_negative(most - largest) : 1.0f;
      float sum = weight;
      GLM_UNROLL
      for (ushort step = 1; step < kPromptKeys; step *= 2) {
        sum += simd_shuffle_xor(sum, step);
      }
      total = fma(total, factor, sum);
      most = largest;
      ((threadgroup float*)weights)[own_head * kScorePitch + own_key] = weight;
      if (own_key == 0) {
        factors[own_head] = factor;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      GLM_UNROLL
      for (int heads = 0; heads < kHeadEights; heads++) {
        const int row = heads * kSide + matrix_row(lane);
        const float scale = factors[row];
        thread float2 left[kKeyEights];
        GLM_UNROLL
        for (int i = 0; i < kKeyEights; i++) {
          const threadgroup float* from = (const threadgroup float*)weights +
              row * kScorePitch + i * kSide + matrix_column(lane);
          left[i] = *(const threadgroup float2*)from;
        }
        GLM_UNROLL
        for (int d = 0; d < kOwnEights; d++) {
          if (part.has(d / kBlockEights)) {
            thread float2 sum_of_keys = float2(0.0f);
            GLM_UNROLL
            for (int i = 0; i < kKeyEights; i++) {
              multiply_matrices(left[i], keys[i].matrix(d), sum_of_keys);
            }
            const int at = heads * kOwnEights + d;
            sums[at] = fma(sums[at], float2(scale), sum_of_keys);
          }
        }
      }
    }
  }
  if (own_key == 0) {
    totals[own_head] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  GLM_UNROLL
  for (int i = 0; i < kHeadEights * kOwnEights * 2; i++) {
    const int row = i / 2 / kOwnEights * kSide + matrix_row(lane);
    const int eight = i / 2 % kOwnEights;
    const int column = part.own_column(eight / kBlockEights) +
        matrix_column(lane) / 2 * kChunk + eight % kBlockEights * 2 + i % 2;
    if (row < part.heads && column < rank) {
      const float all = totals[row];
      y[(first_row + row) * rank + column] =
          all == 0 ? 0.0f : sums[i / 2][i % 2] / all;
    }
  }
}
