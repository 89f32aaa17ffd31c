// Computes attention over chosen latent rows with the arithmetic of
// csrc/attention.h: one launch takes every split of 64 list entries, another
// combines the splits.
#pragma once

#include "mla_combine.h"
#include "mla_split.h"

// A head's columns in device memory.
struct ToDevice {
  device float* y;

  METAL_FUNC void set(int column, float value) const thread {
    y[column] = value;
  }
};

GLM_CONST int kCombineThreads = 128;

// Writes y [tokens, heads, rank]. The grid is (heads, tokens).
[[kernel, max_total_threads_per_threadgroup(kCombineThreads)]] void mla_combine(
    const device float* o [[buffer(0)]],
    const device float* m [[buffer(1)]],
    const device float* l [[buffer(2)]],
    device float* y [[buffer(3)]],
    const constant MlaParams& params [[buffer(4)]],
    threadgroup float* weights [[threadgroup(0)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
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
      kCombineThreads,
      head);
}
