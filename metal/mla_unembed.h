// Attention's splits are combined and go through unembed_out in one launch.
#pragma once

#include "mla_combine.h"
#include "project.h"

// A head's columns in threadgroup memory, rounded to T.
template <typename T>
struct ToThreadgroup {
  threadgroup T* y;

  METAL_FUNC void set(int column, float value) const thread {
    y[column] = static_cast<T>(value);
  }
};

// Vectors in threadgroup memory.
template <typename T>
struct Combined {
  const threadgroup T* x;
  const thread int* offsets;

  template <typename F>
  METAL_FUNC float load(int m, int column, thread float* x_thread)
      const thread {
    thread T values[F::values];
    GLM_UNROLL
    for (int i = 0; i < F::values; i++) {
      values[i] = x[offsets[m] + column + i];
    }
    return F::load_own((const thread T*)values, x_thread);
  }
  template <typename F>
  METAL_FUNC float
  load_safe(int m, int column, int left, thread float* x_thread) const thread {
    thread T values[F::values];
    GLM_UNROLL
    for (int i = 0; i < F::values; i++) {
      values[i] = i < left ? x[offsets[m] + column + i] : T(0);
    }
    return F::load_own((const thread T*)values, x_thread);
  }
};

// Writes y [tokens, heads, values] of this dispatch's tokens. A threadgroup
// takes a head of up to `width` tokens: the grid is (heads, blocks of tokens).
// `vectors` holds `width` times rank values.
template <typename T, int rows, int width, typename F>
[[kernel]] void mla_unembed(
    const device float* o [[buffer(0)]],
    const device float* m [[buffer(1)]],
    const device float* l [[buffer(2)]],
    const device uint8_t* weight [[buffer(3)]],
    const device typename F::scale_type* scales [[buffer(4)]],
    const device typename F::scale_type* biases [[buffer(5)]],
    device T* y [[buffer(6)]],
    const constant UnembedParams& params [[buffer(7)]],
    threadgroup float* weights [[threadgroup(0)]],
    threadgroup T* vectors [[threadgroup(1)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  const int lane = simd_lid, head = tid.x, token = tid.y * width;
  const int used = min(width, params.tokens - token);
  const int rank = params.mla.rows.rank;
  for (int i = 0; i < used; i++) {
    const size_t first =
        size_t(token + i) * params.mla.splits * params.mla.heads + head;
    const ToThreadgroup<T> vector = {vectors + i * rank};
    combine_splits(
        o,
        m,
        l,
        params.mla,
        first,
        weights,
        simd_gid * kLanes + lane,
        simdgroups * kLanes,
        vector);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  thread int offsets[width];  // the last token's, past it
  GLM_UNROLL
  for (int i = 0; i < width; i++) {
    offsets[i] = min(i, used - 1) * rank;
  }
  const Combined<T> combined = {vectors, offsets};
  const Product<T, rows, width, 1> product = {
      &params.product, y, false, (device uint8_t*)y};
  const Matrix<F> w = Matrix<F>{weight, scales, biases}.at(
      head, params.product.rows, rank, lane);
  const int step = simdgroups * rows;
  for (int row = simd_gid * rows; row < params.product.rows; row += step) {
    const Tile tile = {row, params.mla.first_token + token, used, head, lane};
    product.run(w, combined, rank, tile);
  }
}
