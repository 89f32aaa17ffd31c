// Sigmoid routing with a correction bias that chooses but does not weigh. A
// threadgroup takes a token.
#pragma once

#include "dot_rows.h"
#include "formats/dense.h"
#include "params.h"
#include "swiglu.h"

// Tells whether score a of index i comes before score b of index j: the larger
// first, then the lowest index; NaN loses to everything.
METAL_FUNC bool precedes(float a, int i, float b, int j) {
  const float x = isnan(a) ? -INFINITY : a;
  const float y = isnan(b) ? -INFINITY : b;
  return x > y || (x == y && i < j);
}

// Counts those of scores[begin, end) that precede entry i.
METAL_FUNC int
rank_of(const threadgroup float* scores, int begin, int end, int i) {
  const float score = scores[i];
  int rank = 0;
  for (int j = begin; j < end; j++) {
    rank += precedes(scores[j], j, score, i);
  }
  return rank;
}

// Sets weights[e] to row e of `weight` times x.
template <typename T, typename F, int experts>
METAL_FUNC void router_logits(
    const device T* x,
    const device uint8_t* weight,
    int hidden,
    int lane,
    int simdgroup,
    int simdgroups,
    threadgroup float* weights) {
  constexpr int rows = 4;
  const thread int offsets[1] = {0};
  const Matrix<F> matrix =
      Matrix<F>{weight, weight, weight}.at(0, experts, hidden, lane);
  for (int e = simdgroup * rows; e < experts; e += simdgroups * rows) {
    thread float result[rows];
    const Matrix<F> w = matrix.skip(e, 0, hidden);
    const int used = experts - e;
    dot_rows<T, F, 1, rows, 1>(
        &w, hidden, used, x + lane * F::values, offsets, lane, result);
    for (int r = 0; r < rows; r++) {
      if (lane == 0 && r < used) {
        weights[e + r] = result[r];
      }
    }
  }
}

// Sets the scores outside the `kept` best groups to -inf; a group is worth the
// sum of its two best scores.
template <int experts, int groups>
METAL_FUNC void keep_groups(
    threadgroup float* scores,
    threadgroup float* top,
    threadgroup float* worth,
    int kept,
    int thread_id,
    int threads) {
  constexpr int size = experts / groups;
  for (int e = thread_id; e < experts; e += threads) {
    const int group = e / size;
    const int rank = rank_of(scores, group * size, (group + 1) * size, e);
    if (rank < 2) {
      top[2 * group + rank] = scores[e];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int g = thread_id; g < groups; g += threads) {
    worth[g] = top[2 * g] + top[2 * g + 1];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = thread_id; e < experts; e += threads) {
    if (rank_of(worth, 0, groups, e / size) >= kept) {
      scores[e] = -INFINITY;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <typename T, typename W, int experts, int groups>
[[kernel]] void router_topk(
    const device T* x [[buffer(0)]],
    const device uint8_t* weight [[buffer(1)]],
    const device float* correction_bias [[buffer(2)]],
    device int* chosen [[buffer(3)]],
    device float* shares [[buffer(4)]],
    const constant RouterParams& params [[buffer(5)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup float weights[experts];
  threadgroup float scores[experts];
  threadgroup float best[experts];
  threadgroup float top[2 * groups];
  threadgroup float worth[groups];
  const int thread_id = simd_gid * kLanes + simd_lid;
  const int threads = simdgroups * kLanes;

  router_logits<T, Dense<W>, experts>(
      x + tid.x * params.hidden,
      weight,
      params.hidden,
      simd_lid,
      simd_gid,
      simdgroups,
      weights);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = thread_id; e < experts; e += threads) {
    weights[e] = glm_fused::sigmoid(weights[e], glm_fused::As<float>());
    scores[e] = weights[e] + correction_bias[e];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if constexpr (groups > 1) {
    keep_groups<experts, groups>(
        scores, top, worth, params.topk_group, thread_id, threads);
  }

  const int top_k = params.top_k;
  for (int e = thread_id; e < experts; e += threads) {
    const int rank = rank_of(scores, 0, experts, e);
    if (rank < top_k) {
      chosen[tid.x * top_k + rank] = e;
      best[rank] = weights[e];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = thread_id; j < top_k; j += threads) {
    float total = 0;
    for (int i = 0; i < top_k; i++) {
      total = total + best[i];
    }
    total = total + 1e-20f;
    const float share = params.norm_topk_prob ? best[j] / total : best[j];
    shares[tid.x * top_k + j] = share * params.routed_scaling_factor;
  }
}
