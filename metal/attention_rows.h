// Between attention's projections and its caches: a simdgroup norms or rotates
// one row.
#pragma once

#include "lane_sums.h"
#include "norm.h"
#include "params.h"
#include "rotation.h"
#include "view.h"

// A token's angles.
struct Angles {
  const device float* cosines;
  const device float* sines;
  int pairs;
  long cosine_stride;
  long sine_stride;
};

METAL_FUNC Angles angles_of(
    const device float* cosines,
    const device float* sines,
    const constant AttentionRowsParams& params,
    int token) {
  return {
      cosines + row_offset(params.cosines, token),
      sines + row_offset(params.sines, token),
      params.cosines.columns,
      params.cosines.column_stride,
      params.sines.column_stride};
}

// A row as it is.
template <typename T>
struct Plain {
  const device T* x;

  METAL_FUNC float value(int i) const thread {
    return static_cast<float>(x[i]);
  }
};

// A row after LayerNorm, rounded to its type.
template <typename T, typename W, typename B>
struct LayerNormed {
  const device T* x;
  const device W* weight;
  const device B* bias;
  float mean;
  float inverse;

  METAL_FUNC float value(int i) const thread {
    const glm_fused::As<T> type;
    return glm_fused::round_to(
        glm_fused::normed(
            static_cast<float>(x[i]) - mean,
            inverse,
            static_cast<float>(weight[i]),
            static_cast<float>(bias[i]),
            type),
        type);
  }
};

// Writes the row with its leading columns rotated, as rotate_rows does.
template <typename T, typename R>
METAL_FUNC void write_rotated(
    const thread R& row,
    int columns,
    const thread Angles& angles,
    bool interleaved,
    device T* y,
    int lane) {
  const int pairs = angles.pairs;
  for (int i = lane; i < pairs; i += kLanes) {
    const int first = interleaved ? 2 * i : i;
    const int second = interleaved ? 2 * i + 1 : pairs + i;
    const Rotated pair = rotated(
        row.value(first),
        row.value(second),
        angles.cosines[i * angles.cosine_stride],
        angles.sines[i * angles.sine_stride]);
    y[first] = static_cast<T>(pair.first);
    y[second] = static_cast<T>(pair.second);
  }
  for (int i = 2 * pairs + lane; i < columns; i += kLanes) {
    y[i] = static_cast<T>(row.value(i));
  }
}

// Of each token: norms its latent, rotates its RoPE key and its queries' RoPE
// part, and, where there is an indexer, norms and rotates its key and rotates
// its queries. The grid is (1 + heads + 1 + index_heads, tokens), in that
// order; what there is none of is left out.
template <typename T, typename N, typename K, typename B>
[[kernel]] void attention_rows(
    const device T* kv [[buffer(0)]],
    const device N* norm [[buffer(1)]],
    const device T* q [[buffer(2)]],
    const device float* cosines [[buffer(3)]],
    const device float* sines [[buffer(4)]],
    const device T* index_k [[buffer(5)]],
    const device K* index_norm [[buffer(6)]],
    const device B* index_bias [[buffer(7)]],
    const device T* index_q [[buffer(8)]],
    device T* latents [[buffer(9)]],
    device T* ropes [[buffer(10)]],
    device T* queries [[buffer(11)]],
    device T* index_keys [[buffer(12)]],
    device T* index_queries [[buffer(13)]],
    const constant AttentionRowsParams& params [[buffer(14)]],
    uint2 tid [[threadgroup_position_in_grid]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
  const int token = tid.y, lane = simd_lid;
  const int rank = params.rank, rope = params.rope, dim = params.index_dim;
  const Angles angles = angles_of(cosines, sines, params, token);
  int row = tid.x;
  if (row == 0) {
    kv += size_t(token) * (rank + rope);
    latents += size_t(token) * rank;
    const float squares = squares_of(kv, 1, rank, 0.0f, lane);
    const float inverse = glm_fused::inverse_root(squares, rank, params.eps);
    for (int i = lane; i < rank; i += kLanes) {
      latents[i] = static_cast<T>(glm_fused::normed(
          static_cast<float>(kv[i]),
          inverse,
          static_cast<float>(norm[i]),
          glm_fused::As<T>()));
    }
    const Plain<T> key = {kv + rank};
    write_rotated(key, rope, angles, true, ropes + size_t(token) * rope, lane);
    return;
  }
  row -= 1;
  if (row < params.heads) {
    const size_t head = size_t(token) * params.heads + row;
    const Plain<T> query = {q + head * (params.nope + rope) + params.nope};
    write_rotated(
        query, rope, angles, true, queries + head * (rank + rope) + rank, lane);
    return;
  }
  row -= params.heads;
  const bool interleaved = params.interleaved != 0;
  if (row == 0) {
    index_k += size_t(token) * dim;
    const float mean = sum_of(index_k, 1, dim, lane) / static_cast<float>(dim);
    const float squares = squares_of(index_k, 1, dim, mean, lane);
    const float inverse =
        glm_fused::inverse_root(squares, dim, params.index_eps);
    const LayerNormed<T, K, B> key = {
        index_k, index_norm, index_bias, mean, inverse};
    write_rotated(
        key, dim, angles, interleaved, index_keys + size_t(token) * dim, lane);
    return;
  }
  row -= 1;
  const size_t at = (size_t(token) * params.index_heads + row) * dim;
  const Plain<T> query = {index_q + at};
  write_rotated(query, dim, angles, interleaved, index_queries + at, lane);
}
