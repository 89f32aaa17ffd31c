// Computes attention over chosen latent rows with the arithmetic of
// csrc/attention.h: one launch takes every split of 64 list entries, another
// combines the splits.
#pragma once

#include "cached_rows.h"
#include "mla_combine.h"
#include "softmax_exp.h"

GLM_CONST int kSplit = 64;  // list entries, and heads, in a threadgroup
GLM_CONST int kSide = 16;   // threads on a side: a thread takes 4 heads
GLM_CONST int kEach = kSplit / kSide;
GLM_CONST int kMlaThreads = kSide * kSide;
GLM_CONST int kDepth = 32;  // dimensions, or columns, in threadgroup memory
GLM_CONST int kPitch = kSplit + 1;  // puts neighbouring columns in other banks

// Gives entry `entry` of a token's list of keys, -1 where no such key is
// visible.
METAL_FUNC int listed_key(
    const device int* selected,
    const constant MlaParams& params,
    Visible visible,
    int token,
    int entry) {
  int key = visible.low + entry;
  if (params.listed > 0) {
    key = entry < params.listed
        ? selected[size_t(token) * params.listed + entry]
        : -1;
  }
  return key >= visible.low && key < visible.high ? key : -1;
}

// A threadgroup takes `heads` heads from `head` on, of one split of one token.
template <typename T, typename R>
struct MlaSplit {
  const device T* q;  // [heads, rank + rope]
  R rows;
  const threadgroup int* list;  // [kSplit]
  threadgroup float* p;  // [kSplit keys, kPitch]; before, a block of q and k
  threadgroup float* block;  // [kSplit keys, kDepth]
  threadgroup float* most;   // [kSplit heads]
  int dims;
  int heads;
  int thread_id;

  // Loads q and k of dimensions [first, first + depth), transposed.
  METAL_FUNC void load_dims(int first, int depth) const thread {
    threadgroup float* queries = p;
    threadgroup float* keys = p + kDepth * kPitch;
    for (int i = thread_id; i < kSplit * kDepth; i += kMlaThreads) {
      const int row = i / kDepth, d = i % kDepth;
      if (d < depth) {
        const bool head = row < heads, key = list[row] >= 0;
        queries[d * kPitch + row] =
            head ? static_cast<float>(q[row * dims + first + d]) : 0.0f;
        keys[d * kPitch + row] = key ? rows.value(list[row], first + d) : 0.0f;
      }
    }
  }

  // Sets p[key][head] to scale * (q . k), summed in order of dimensions.
  METAL_FUNC void scores(float scale) const thread {
    const int y = thread_id / kSide, x = thread_id % kSide;
    thread float sum[kEach * kEach];
    for (int i = 0; i < kEach * kEach; i++) {
      sum[i] = 0;
    }
    for (int first = 0; first < dims; first += kDepth) {
      const int depth = min(kDepth, dims - first);
      load_dims(first, depth);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int d = 0; d < depth; d++) {
        const threadgroup float* queries = p + d * kPitch + y;
        const threadgroup float* keys = p + (kDepth + d) * kPitch + x;
        for (int i = 0; i < kEach * kEach; i++) {
          const float a = queries[i / kEach * kSide];
          const float b = keys[i % kEach * kSide];
          sum[i] = fma(a, b, sum[i]);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int i = 0; i < kEach * kEach; i++) {
      const int head = y + i / kEach * kSide, key = x + i % kEach * kSide;
      p[key * kPitch + head] = sum[i] * scale;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Turns scores into p; thread `head` writes its m and l.
  METAL_FUNC void softmax(device float* m, device float* l) const thread {
    if (thread_id < kSplit) {
      float largest = -INFINITY;
      for (int key = 0; key < kSplit; key++) {
        const float s = p[key * kPitch + thread_id];
        largest = list[key] >= 0 && s > largest ? s : largest;
      }
      most[thread_id] = largest;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_id; i < kSplit * kSplit; i += kMlaThreads) {
      const int at = i / kSplit * kPitch + i % kSplit;
      p[at] = glm_fused::exp_negative(p[at] - most[i % kSplit]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_id < heads) {
      float sum = 0;
      for (int key = 0; key < kSplit; key++) {
        sum = list[key] >= 0 ? sum + p[key * kPitch + thread_id] : sum;
      }
      m[thread_id] = most[thread_id];
      l[thread_id] = sum;
    }
  }

  // Writes columns [first, first + kDepth) of o [heads, rank].
  METAL_FUNC void values(int first, int rank, device float* o) const thread {
    for (int i = thread_id; i < kSplit * kDepth; i += kMlaThreads) {
      const int key = list[i / kDepth], column = first + i % kDepth;
      block[i] = key >= 0 && column < rank ? rows.value(key, column) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    constexpr int wide = kDepth / kSide;
    const int y = thread_id / kSide, x = thread_id % kSide;
    thread float sum[kEach * wide];
    for (int i = 0; i < kEach * wide; i++) {
      sum[i] = 0;
    }
    for (int key = 0; key < kSplit; key++) {
      if (list[key] >= 0) {
        for (int i = 0; i < kEach * wide; i++) {
          const float a = p[key * kPitch + y + i / wide * kSide];
          const float b = block[key * kDepth + x + i % wide * kSide];
          sum[i] = fma(a, b, sum[i]);
        }
      }
    }
    for (int i = 0; i < kEach * wide; i++) {
      const int head = y + i / wide * kSide;
      const int column = first + x + i % wide * kSide;
      if (head < heads && column < rank) {
        o[head * rank + column] = sum[i];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
};

// Writes m, l [tokens, splits, heads] and o [tokens, splits, heads, rank] of
// this dispatch. The grid is (splits, blocks of 64 heads, tokens).
template <typename T, typename R>
[[kernel]] void mla_split(
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
  threadgroup float p[kSplit * kPitch];
  threadgroup float block[kSplit * kDepth];
  threadgroup float most[kSplit];
  threadgroup int list[kSplit];
  const int thread_id = simd_gid * kLanes + simd_lid;
  const int token = params.first_token + tid.z, head = tid.y * kSplit;
  const int queries = params.rows.queries, b = token / queries;
  if (thread_id < kSplit) {
    const Visible visible =
        visible_keys(start, params.rows, b, token % queries);
    const int entry = tid.x * kSplit + thread_id;
    list[thread_id] = listed_key(selected, params, visible, token, entry);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int rank = params.rows.rank, dims = rank + params.rows.rope;
  const size_t first =
      (size_t(tid.z) * params.splits + tid.x) * params.heads + head;
  const MlaSplit<T, R> part = {
      q + (size_t(token) * params.heads + head) * dims,
      rows_of<R>(latents, ropes, params.rows, b),
      list,
      p,
      block,
      most,
      dims,
      min(kSplit, params.heads - head),
      thread_id};
  part.scores(params.scale);
  part.softmax(m + first, l + first);
  for (int column = 0; column < rank; column += kDepth) {
    part.values(column, rank, o + first * rank);
  }
}

// A head's columns in device memory.
struct ToDevice {
  device float* y;

  METAL_FUNC void set(int column, float value) const thread {
    y[column] = value;
  }
};

// Writes y [tokens, heads, rank]. The grid is (heads, tokens).
[[kernel]] void mla_combine(
    const device float* o [[buffer(0)]],
    const device float* m [[buffer(1)]],
    const device float* l [[buffer(2)]],
    device float* y [[buffer(3)]],
    const constant MlaParams& params [[buffer(4)]],
    threadgroup float* weights [[threadgroup(0)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  const int token = params.first_token + tid.y;
  const size_t first = size_t(tid.y) * params.splits * params.heads + tid.x;
  const ToDevice head = {
      y + (size_t(token) * params.heads + tid.x) * params.rows.rank};
  combine_splits(
      o,
      m,
      l,
      params,
      first,
      weights,
      simd_gid * kLanes + simd_lid,
      simdgroups * kLanes,
      head);
}
