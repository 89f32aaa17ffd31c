// Matrices times up to 16 vectors that they share, in one launch; a norm may
// come before, and a residual or a SwiGLU after.
#pragma once

#include "dot_rows.h"
#include "lane_sums.h"
#include "norm.h"
#include "params.h"
#include "swiglu.h"

// Vectors that each lane computes as it needs them: x rounded to T, or its
// RMSNorm.
template <typename T, typename X, typename N, bool normed>
struct Activations {
  const device X* x;
  const thread int* offsets;
  const device N* weight;
  const threadgroup float* inverses;  // of a vector's root mean square

  METAL_FUNC T value(int m, int column) const thread {
    const float value = static_cast<float>(x[offsets[m] + column]);
    if constexpr (normed) {
      return static_cast<T>(glm_fused::normed(
          value,
          inverses[m],
          static_cast<float>(weight[column]),
          glm_fused::As<T>()));
    }
    return static_cast<T>(value);
  }
  template <typename F>
  METAL_FUNC float load(int m, int column, thread float* x_thread)
      const thread {
    thread T values[F::values];
    GLM_UNROLL
    for (int i = 0; i < F::values; i++) {
      values[i] = value(m, column + i);
    }
    return F::load_own((const thread T*)values, x_thread);
  }
  template <typename F>
  METAL_FUNC float
  load_safe(int m, int column, int left, thread float* x_thread) const thread {
    thread T values[F::values];
    GLM_UNROLL
    for (int i = 0; i < F::values; i++) {
      values[i] = i < left ? value(m, column + i) : T(0);
    }
    return F::load_own((const thread T*)values, x_thread);
  }
};

// Sets inverses[m] for each of the vectors.
template <int width, typename X>
METAL_FUNC void find_inverses(
    const device X* x,
    const thread int* offsets,
    int k,
    float eps,
    threadgroup float* inverses,
    int simdgroup,
    int simdgroups,
    int lane) {
  for (int m = simdgroup; m < width; m += simdgroups) {
    const float squares = squares_of(x + offsets[m], 1, k, 0.0f, lane);
    if (lane == 0) {
      inverses[m] = glm_fused::inverse_root(squares, k, eps);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Where a simdgroup is: its rows of one matrix, its vectors, its lane.
struct Tile {
  int row;    // the first one
  int token;  // of vector 0
  int count;  // of vectors
  int head;
  int lane;
};

// One of the products, or a SwiGLU of two.
template <typename T, int rows, int width, int depth>
struct Product {
  const constant ProductParams* params;
  const device T* residual;
  bool adds;  // the residual
  device uint8_t* y;

  template <typename F, typename V>
  METAL_FUNC void run(Matrix<F> w, const thread V& x, int k, Tile tile)
      const thread {
    constexpr int step = rows_at_once(rows, width);
    thread float result[step * width];
    for (int r = 0; r < rows; r += step) {
      const int row = tile.row + r, used = params->rows - row;
      if (used <= 0) {
        return;
      }
      const Matrix<F> from = w.skip(row, 0, k);
      dot_rows<V, F, 1, step, width, depth>(
          &from, k, used, x, tile.lane, result);
      GLM_UNROLL
      for (int i = 0; i < step * width; i++) {
        if (tile.lane == 0 && i / width < used && i % width < tile.count) {
          store(place(tile, i % width, row + i / width), result[i]);
        }
      }
    }
  }

  template <typename A, typename B, typename V>
  METAL_FUNC void swiglu(
      Matrix<A> gate,
      Matrix<B> up,
      const thread V& x,
      int k,
      Tile tile) const thread {
    constexpr int step = rows_at_once(rows, width);
    thread float result[2 * step * width];
    for (int r = 0; r < rows; r += step) {
      const int row = tile.row + r, used = params->rows - row;
      if (used <= 0) {
        return;
      }
      dot_pair<step, width>(
          gate.skip(row, 0, k),
          up.skip(row, 0, k),
          k,
          used,
          x,
          tile.lane,
          result);
      GLM_UNROLL
      for (int i = 0; i < step * width; i++) {
        if (tile.lane == 0 && i / width < used && i % width < tile.count) {
          const glm_fused::As<T> type;
          const float gated = glm_fused::round_to(result[i], type);
          const float upped =
              glm_fused::round_to(result[step * width + i], type);
          store(
              place(tile, i % width, row + i / width),
              glm_fused::swiglu(gated, upped, type));
        }
      }
    }
  }

  METAL_FUNC int place(Tile tile, int m, int row) const thread {
    return (tile.token + m) * params->token_stride +
        tile.head * params->head_stride + row;
  }
  METAL_FUNC void store(int at, float value) const thread {
    if (params->wide) {
      ((device float*)y)[at] = value;
      return;
    }
    const float rounded = glm_fused::round_to(value, glm_fused::As<T>());
    ((device T*)y)[at] = static_cast<T>(
        adds ? static_cast<float>(residual[at]) + rounded : rounded);
  }
};

// Writes up to four products W x. A threadgroup takes rows of one matrix, of
// one head, and up to `width` tokens: the grid is (blocks of rows of all
// matrices, blocks of tokens, heads). With one block more, that writes the norm
// of x, too. With `pair`, the first two are gate and up, and what is written is
// their SwiGLU.
template <
    typename T,
    typename X,
    typename N,
    bool normed,
    bool pair,
    int rows,
    int width,
    int depth,
    int count,
    typename A,
    typename B = A,
    typename C = A,
    typename D = A>
[[kernel]] void project(
    const device X* x [[buffer(0)]],
    const device N* norm [[buffer(1)]],
    const device T* residual [[buffer(2)]],
    const device uint8_t* a_weight [[buffer(3)]],
    const device typename A::scale_type* a_scales [[buffer(4)]],
    const device typename A::scale_type* a_biases [[buffer(5)]],
    const device uint8_t* b_weight [[buffer(6)]],
    const device typename B::scale_type* b_scales [[buffer(7)]],
    const device typename B::scale_type* b_biases [[buffer(8)]],
    const device uint8_t* c_weight [[buffer(9)]],
    const device typename C::scale_type* c_scales [[buffer(10)]],
    const device typename C::scale_type* c_biases [[buffer(11)]],
    const device uint8_t* d_weight [[buffer(12)]],
    const device typename D::scale_type* d_scales [[buffer(13)]],
    const device typename D::scale_type* d_biases [[buffer(14)]],
    device uint8_t* a_y [[buffer(15)]],
    device uint8_t* b_y [[buffer(16)]],
    device uint8_t* c_y [[buffer(17)]],
    device uint8_t* d_y [[buffer(18)]],
    device T* normed_x [[buffer(19)]],
    const constant ProjectParams& params [[buffer(20)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float inverses[width];
  const int k = params.columns, lane = simd_lid, head = tid.z;
  const int token = tid.y * width;
  const int used = min(width, params.tokens - token);
  thread int offsets[width];  // the last token's, past it
  GLM_UNROLL
  for (int m = 0; m < width; m++) {
    offsets[m] = (token + min(m, used - 1)) * params.token_stride +
        head * params.head_stride;
  }
  if constexpr (normed) {
    find_inverses<width>(
        x, offsets, k, params.eps, inverses, simd_gid, simdgroups, lane);
  }
  const Activations<T, X, N, normed> vectors = {x, offsets, norm, inverses};

  const int group = tid.x;
  if constexpr (normed) {
    if (group == params.groups) {
      for (int m = simd_gid; m < used; m += simdgroups) {
        device T* y = normed_x + (token + m) * k;
        for (int i = lane; i < k; i += kLanes) {
          y[i] = vectors.value(m, i);
        }
      }
      return;
    }
  }
  int i = 0;  // the threadgroup's matrix
  GLM_UNROLL
  for (int j = 1; j < count; j++) {
    i = group >= params.products[j].first_group ? j : i;
  }
  const constant ProductParams* own = params.products + i;
  const int n = own->rows;
  const int row = ((group - own->first_group) * simdgroups + simd_gid) * rows;
  const Tile tile = {row, token, used, head, lane};
  Product<T, rows, width, depth> product = {
      own, residual, params.adds != 0, a_y};
  const Matrix<A> a = Matrix<A>{a_weight, a_scales, a_biases};
  const Matrix<B> b = Matrix<B>{b_weight, b_scales, b_biases};
  if constexpr (pair) {
    return product.swiglu(
        a.at(head, n, k, lane), b.at(head, n, k, lane), vectors, k, tile);
  }
  if (i == 0) {
    product.run(a.at(head, n, k, lane), vectors, k, tile);
  }
  if constexpr (count > 1) {
    if (i == 1) {
      product.y = b_y;
      product.run(b.at(head, n, k, lane), vectors, k, tile);
    }
  }
  if constexpr (count > 2) {
    if (i == 2) {
      const Matrix<C> c = Matrix<C>{c_weight, c_scales, c_biases};
      product.y = c_y;
      product.run(c.at(head, n, k, lane), vectors, k, tile);
    }
  }
  if constexpr (count > 3) {
    if (i == 3) {
      const Matrix<D> d = Matrix<D>{d_weight, d_scales, d_biases};
      product.y = d_y;
      product.run(d.at(head, n, k, lane), vectors, k, tile);
    }
  }
}
