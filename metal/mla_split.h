// Attention of 16 heads over a split of 64 list entries. Blocks of q and k, and
// then of k alone, pass through threadgroup memory; while a block is worked on,
// the next one is on its way to the other half of that memory.
#pragma once

#include "listed_keys.h"
#include "row_chunks.h"
#include "softmax_exp.h"

GLM_CONST int kHeads = 16;  // of a threadgroup
GLM_CONST int kMlaSimdgroups = 4;
GLM_CONST int kMlaThreads = kMlaSimdgroups * kLanes;

// A block of scores has kDepth dimensions, in rows that begin in unlike banks;
// a thread loads a chunk of a key, and some a chunk of a head.
GLM_CONST int kDepth = kMlaThreads * kChunk / kSplit;
GLM_CONST int kParts = kDepth / kChunk;
GLM_CONST int kPitch = kDepth + 4;
GLM_CONST int kDimsBlock = (kHeads + kSplit) * kPitch;

// A block of values has kKeys keys, of which a simdgroup loads one.
GLM_CONST int kKeys = kMlaSimdgroups;
GLM_CONST int kColumns = kLanes * kChunk;
GLM_CONST int kValuesBlock = kKeys * kColumns;
GLM_CONST int kWeights = kSplit * kHeads;

// Weights and blocks of values lie where blocks of scores were.
GLM_CONST int kMlaFloats = 2 * kDimsBlock;
static_assert(kWeights + 2 * kValuesBlock <= kMlaFloats, "they do not fit");

// A simdgroup takes 16 keys, and later 64 columns: its lanes are kTall by
// kWide, and each has kOwnHeads heads with kOwnKeys keys or kOwnColumns
// columns.
GLM_CONST int kWide = 8;
GLM_CONST int kTall = kLanes / kWide;
GLM_CONST int kOwnHeads = kHeads / kTall;
static_assert(kOwnHeads == 4, "their weights are a float4");
GLM_CONST int kOwnKeys = kSplit / kMlaSimdgroups / kWide;
GLM_CONST int kOwnColumns = kColumns / kMlaSimdgroups / kWide;
GLM_CONST int kScores = kOwnHeads * kOwnKeys;
GLM_CONST int kSums = kOwnHeads * kOwnColumns;

template <typename T, typename R, int unit>
struct MlaSplit {
  typedef FloatRows<T, T> Q;

  Q queries;  // [heads, dims], of the threadgroup's heads
  R rows;
  const threadgroup int* list;  // [count]
  threadgroup float* memory;    // [kMlaFloats]; p is [kSplit keys, kHeads]
  threadgroup float* most;      // [kMlaSimdgroups, kHeads]
  int heads;
  int count;  // of keys
  int simdgroup;
  int lane;

  // A thread loads and stores a part of this row of a block of scores, which
  // is a key's and, while there are any, a head's.
  METAL_FUNC int own_row() const thread {
    return (simdgroup * kLanes + lane) / kParts;
  }
  METAL_FUNC int own_part() const thread {
    return lane % kParts * kChunk;
  }

  // Loads q, and k of `listed` unless it is -1, from dimension `first` on.
  METAL_FUNC void load_dims(
      int first,
      int listed,
      thread Chunk<Q, unit>& query,
      thread Chunk<R, unit>& key) const thread {
    const int column = first + own_part(), end = queries.rank;
    key.clear();
    if (listed >= 0 && column < end) {
      key.load(rows, listed, column, end);
    }
    query.clear();
    if (own_row() < heads && column < end) {
      query.load(queries, own_row(), column, end);
    }
  }

  METAL_FUNC void store_dims(
      threadgroup float* block,
      const thread Chunk<Q, unit>& query,
      const thread Chunk<R, unit>& key) const thread {
    threadgroup float* to = block + own_row() * kPitch + own_part();
    store(key, to + kHeads * kPitch);
    if (own_row() < kHeads) {
      store(query, to);
    }
  }

  template <typename C>
  METAL_FUNC void store(const thread C& chunk, threadgroup float* to)
      const thread {
    GLM_UNROLL
    for (int i = 0; i < kChunk; i += 4) {
      *(threadgroup float4*)(to + i) = float4(
          chunk.value(i),
          chunk.value(i + 1),
          chunk.value(i + 2),
          chunk.value(i + 3));
    }
  }

  METAL_FUNC int own_key(int i) const thread {
    return (simdgroup * kOwnKeys + i) * kWide + lane % kWide;
  }

  // Sets a thread's scores to q . k, summed in order of dimensions; those past
  // the last add 0 times 0.
  METAL_FUNC void dot(thread float* scores) const thread {
    thread Chunk<Q, unit> query;
    thread Chunk<R, unit> key;
    GLM_UNROLL
    for (int i = 0; i < kScores; i++) {
      scores[i] = 0;
    }
    threadgroup float* block = memory;
    threadgroup float* other = memory + kDimsBlock;
    const int listed = own_row() < count ? list[own_row()] : -1;
    load_dims(0, listed, query, key);
    store_dims(block, query, key);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int first = kDepth; first < queries.rank; first += kDepth) {
      load_dims(first, listed, query, key);
      dot_block(block, scores);
      store_dims(other, query, key);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      threadgroup float* done = block;
      block = other;
      other = done;
    }
    dot_block(block, scores);
  }

  METAL_FUNC void dot_block(
      const threadgroup float* block,
      thread float* scores) const thread {
    const threadgroup float* q = block + lane / kWide * kPitch;
    const threadgroup float* k = block + kHeads * kPitch;
    thread float4 a[kOwnHeads];
    thread float4 b[kOwnKeys];
    GLM_UNROLL
    for (int d = 0; d < kDepth; d += 4) {
      GLM_UNROLL
      for (int i = 0; i < kOwnHeads; i++) {
        a[i] = *(const threadgroup float4*)(q + i * kTall * kPitch + d);
      }
      GLM_UNROLL
      for (int i = 0; i < kOwnKeys; i++) {
        b[i] = *(const threadgroup float4*)(k + own_key(i) * kPitch + d);
      }
      GLM_UNROLL
      for (int i = 0; i < 4 * kScores; i++) {
        const int c = i / kScores, at = i % kScores;
        scores[at] = fma(a[at / kOwnKeys][c], b[at % kOwnKeys][c], scores[at]);
      }
    }
  }

  // Gives the largest score of a head.
  METAL_FUNC float most_of(int head) const thread {
    float largest = -INFINITY;
    GLM_UNROLL
    for (int i = 0; i < kMlaSimdgroups; i++) {
      largest = larger(largest, most[i * kHeads + head]);
    }
    return largest;
  }

  // Turns scores to p, which is 0 for keys past the last, and writes m and l.
  METAL_FUNC void softmax(
      thread float* scores,
      float scale,
      device float* m,
      device float* l) const thread {
    threadgroup float* p = memory;
    const int y = lane / kWide;
    GLM_UNROLL
    for (int i = 0; i < kOwnHeads; i++) {
      float largest = -INFINITY;
      GLM_UNROLL
      for (int j = 0; j < kOwnKeys; j++) {
        const float s = scores[i * kOwnKeys + j] * scale;
        scores[i * kOwnKeys + j] = s;
        largest = own_key(j) < count ? larger(largest, s) : largest;
      }
      GLM_UNROLL
      for (ushort step = 1; step < kWide; step *= 2) {
        largest = larger(largest, simd_shuffle_xor(largest, step));
      }
      if (lane % kWide == 0) {
        most[simdgroup * kHeads + y + i * kTall] = largest;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    GLM_UNROLL
    for (int i = 0; i < kScores; i++) {
      const int head = y + i / kOwnKeys * kTall, key = own_key(i % kOwnKeys);
      p[key * kHeads + head] = key < count
          ? glm_fused::exp_negative(scores[i] - most_of(head))
          : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0 && lane < heads) {
      float sum = 0;
      GLM_UNROLL
      for (int key = 0; key < kSplit; key++) {
        sum = sum + p[key * kHeads + lane];
      }
      m[lane] = most_of(lane);
      l[lane] = sum;
    }
  }

  METAL_FUNC void load_values(
      int first_key,
      int first_column,
      thread Chunk<R, unit>& chunk) const thread {
    const int key = first_key + simdgroup, end = rows.rank;
    const int column = first_column + lane * kChunk;
    chunk.clear();
    if (key < count && column < end) {
      chunk.load(rows, list[key], column, end);
    }
  }

  // Writes columns [first, first + kColumns) of o [heads, rank].
  METAL_FUNC void values(int first, device float* o) const thread {
    thread Chunk<R, unit> chunk;
    thread float sums[kSums];
    GLM_UNROLL
    for (int i = 0; i < kSums; i++) {
      sums[i] = 0;
    }
    threadgroup float* block = memory + kWeights;
    threadgroup float* other = block + kValuesBlock;
    const int own = simdgroup * kColumns + lane * kChunk;
    load_values(0, first, chunk);
    store(chunk, block + own);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int key = 0;
    for (; key + kKeys < count; key += kKeys) {
      load_values(key + kKeys, first, chunk);
      weigh<true>(key, block, sums);
      store(chunk, other + own);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      threadgroup float* done = block;
      block = other;
      other = done;
    }
    weigh<false>(key, block, sums);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    write(sums, first, o);
  }

  // Adds a block's keys from `first` on; unless `whole`, those before `count`.
  template <bool whole>
  METAL_FUNC void weigh(
      int first,
      const threadgroup float* block,
      thread float* sums) const thread {
    const threadgroup float* p =
        memory + first * kHeads + lane / kWide * kOwnHeads;
    const threadgroup float* v = block + own_column(0);
    GLM_UNROLL
    for (int key = 0; key < kKeys; key++) {
      if (whole || first + key < count) {
        const float4 a = *(const threadgroup float4*)(p + key * kHeads);
        thread float4 b[kOwnColumns / 4];
        GLM_UNROLL
        for (int i = 0; i < kOwnColumns / 4; i++) {
          b[i] =
              *(const threadgroup float4*)(v + key * kColumns + i * 4 * kWide);
        }
        GLM_UNROLL
        for (int i = 0; i < kSums; i++) {
          const int column = i % kOwnColumns;
          sums[i] = fma(a[i / kOwnColumns], b[column / 4][column % 4], sums[i]);
        }
      }
    }
  }

  // A thread's columns are fours, kWide fours apart.
  METAL_FUNC int own_column(int four) const thread {
    return simdgroup * kWide * kOwnColumns + (four * kWide + lane % kWide) * 4;
  }

  METAL_FUNC void write(const thread float* sums, int first, device float* o)
      const thread {
    GLM_UNROLL
    for (int i = 0; i < kSums; i += 4) {
      const int head = lane / kWide * kOwnHeads + i / kOwnColumns;
      const int column = first + own_column(i % kOwnColumns / 4);
      if (head >= heads || column >= rows.rank) {
        continue;
      }
      device float* to = o + head * rows.rank + column;
      if constexpr (unit > 0) {
        *(device float4*)to =
            float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
      } else {
        GLM_UNROLL
        for (int j = 0; j < 4; j++) {
          if (column + j < rows.rank) {
            to[j] = sums[i + j];
          }
        }
      }
    }
  }
};

// Writes m, l [tokens, splits, heads] and o [tokens, splits, heads, rank] of
// this dispatch. The grid is (splits, blocks of 16 heads, tokens).
template <typename T, typename R, int unit>
[[kernel, max_total_threads_per_threadgroup(kMlaThreads)]] void mla_split(
    const device T* q [[buffer(0)]],
    const device uint8_t* latents [[buffer(1)]],
    const device uint8_t* ropes [[buffer(2)]],
    const device int* selected [[buffer(3)]],
    const device int* start [[buffer(4)]],
    device float* o [[buffer(5)]],
    device float* m [[buffer(6)]],
    device float* l [[buffer(7)]],
    const constant MlaParams& params [[buffer(8)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
  threadgroup float4 memory[kMlaFloats / 4];
  threadgroup float most[kMlaSimdgroups * kHeads];
  threadgroup int list[kSplit];
  const int simdgroup = simd_gid, lane = simd_lid;
  const int token = params.first_token + tid.z, head = tid.y * kHeads;
  const int queries = params.rows.queries, b = token / queries;
  const Visible visible = visible_keys(start, params.rows, b, token % queries);
  const int count = list_keys(
      selected, params, visible, token, tid.x * kSplit, list, simdgroup, lane);

  const int rank = params.rows.rank, dims = rank + params.rows.rope;
  const device uint8_t* own =
      (const device uint8_t*)(q + (size_t(token) * params.heads + head) * dims);
  const size_t first =
      (size_t(tid.z) * params.splits + tid.x) * params.heads + head;
  const MlaSplit<T, R, unit> part = {
      {own, own, dims, dims * int(sizeof(T)), 0},
      rows_of<R>(latents, ropes, params.rows, b),
      list,
      (threadgroup float*)memory,
      most,
      min(kHeads, params.heads - head),
      count,
      simdgroup,
      lane};
  thread float scores[kScores];
  part.dot(scores);
  part.softmax(scores, params.scale, m + first, l + first);
  for (int column = 0; column < rank; column += kColumns) {
    part.values(column, o + first * rank);
  }
}
