// Between attention's projections and its caches: rows that a simdgroup norms
// or rotates.
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
    const constant AttentionParams& params,
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
// its queries. These are a token's rows 0, 1 to heads, heads + 1, and the
// index_heads after it.
template <typename T, typename N, typename K, typename B>
struct AttentionRows {
  const device T* kv;
  const device N* norm;
  const device T* q;
  const device T* index_k;
  const device K* index_norm;
  const device B* index_bias;
  const device T* index_q;
  device T* latents;
  device T* ropes;
  device T* queries;
  device T* index_keys;
  device T* index_queries;
  const constant AttentionParams* params;
  int lane;

  METAL_FUNC void run(const thread Angles& angles, int token, int row)
      const thread {
    const int heads = params->heads;
    if (row == 0) {
      latent(angles, token);
    } else if (row <= heads) {
      query(angles, token * heads + row - 1);
    } else if (row == heads + 1) {
      index_key(angles, token);
    } else {
      index_query(angles, token * params->index_heads + row - heads - 2);
    }
  }

  METAL_FUNC void latent(const thread Angles& angles, int token) const thread {
    const int rank = params->rank, rope = params->rope;
    const device T* x = kv + token * (rank + rope);
    device T* y = latents + token * rank;
    const float squares = squares_of(x, 1, rank, 0.0f, lane);
    const float inverse = glm_fused::inverse_root(squares, rank, params->eps);
    for (int i = lane; i < rank; i += kLanes) {
      y[i] = static_cast<T>(glm_fused::normed(
          static_cast<float>(x[i]),
          inverse,
          static_cast<float>(norm[i]),
          glm_fused::As<T>()));
    }
    const Plain<T> key = {x + rank};
    write_rotated(key, rope, angles, true, ropes + token * rope, lane);
  }

  METAL_FUNC void query(const thread Angles& angles, int head) const thread {
    const int nope = params->nope, rank = params->rank, rope = params->rope;
    const Plain<T> row = {q + head * (nope + rope) + nope};
    device T* y = queries + head * (rank + rope) + rank;
    write_rotated(row, rope, angles, true, y, lane);
  }

  METAL_FUNC void index_key(const thread Angles& angles, int token)
      const thread {
    const int dim = params->index_dim;
    const device T* x = index_k + token * dim;
    const float mean = sum_of(x, 1, dim, lane) / static_cast<float>(dim);
    const float squares = squares_of(x, 1, dim, mean, lane);
    const float inverse =
        glm_fused::inverse_root(squares, dim, params->index_eps);
    const LayerNormed<T, K, B> key = {x, index_norm, index_bias, mean, inverse};
    write_rotated(
        key, dim, angles, params->interleaved, index_keys + token * dim, lane);
  }

  METAL_FUNC void index_query(const thread Angles& angles, int head)
      const thread {
    const int dim = params->index_dim;
    const Plain<T> row = {index_q + head * dim};
    write_rotated(
        row,
        dim,
        angles,
        params->interleaved,
        index_queries + head * dim,
        lane);
  }
};
