// The last launch before the caches: embed_q of each head, and the rows beside
// it.
#pragma once

#include "attention_rows.h"
#include "project.h"

// A threadgroup takes rows of a head's matrix, or, after those, a row of
// AttentionRows a simdgroup; both of up to `width` tokens. The grid is
// (head_groups * heads + row_groups, blocks of tokens).
template <
    typename T,
    typename N,
    typename K,
    typename B,
    int rows,
    int width,
    typename F>
[[kernel]] void attention_queries(
    const device T* q [[buffer(0)]],
    const device uint8_t* weight [[buffer(1)]],
    const device typename F::scale_type* scales [[buffer(2)]],
    const device typename F::scale_type* biases [[buffer(3)]],
    const device T* kv [[buffer(4)]],
    const device N* norm [[buffer(5)]],
    const device float* cosines [[buffer(6)]],
    const device float* sines [[buffer(7)]],
    const device T* index_k [[buffer(8)]],
    const device K* index_norm [[buffer(9)]],
    const device B* index_bias [[buffer(10)]],
    const device T* index_q [[buffer(11)]],
    device T* queries [[buffer(12)]],
    device T* latents [[buffer(13)]],
    device T* ropes [[buffer(14)]],
    device T* index_keys [[buffer(15)]],
    device T* index_queries [[buffer(16)]],
    const constant AttentionParams& params [[buffer(17)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  const int lane = simd_lid, group = tid.x, token = tid.y * width;
  const int used = min(width, params.tokens - token);
  const int products = params.head_groups * params.heads;
  if (group >= products) {
    const int at = (group - products) * simdgroups + simd_gid;
    if (at >= params.rows * used) {
      return;
    }
    const AttentionRows<T, N, K, B> all = {
        kv,
        norm,
        q,
        index_k,
        index_norm,
        index_bias,
        index_q,
        latents,
        ropes,
        queries,
        index_keys,
        index_queries,
        &params,
        lane};
    const int own = token + at / params.rows;
    const Angles angles = angles_of(cosines, sines, params, own);
    return all.run(angles, own, at % params.rows);
  }
  const int head = group / params.head_groups;
  const int row = (group % params.head_groups * simdgroups + simd_gid) * rows;
  const int columns = params.nope + params.rope;
  thread int offsets[width];  // the last token's, past it
  GLM_UNROLL
  for (int m = 0; m < width; m++) {
    offsets[m] = ((token + min(m, used - 1)) * params.heads + head) * columns;
  }
  const Vectors<T> vectors = {q, offsets};
  const Product<T, rows, width, 1> product = {
      &params.product, q, false, (device uint8_t*)queries};
  const Tile tile = {row, token, used, head, lane};
  const Matrix<F> w = Matrix<F>{weight, scales, biases}.at(
      head, params.rank, params.nope, lane);
  product.run(w, vectors, params.nope, tile);
}
