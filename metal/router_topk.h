// Sigmoid routing with a correction bias that chooses but does not weigh: one
// launch computes logits, another chooses.
#pragma once

#include "dot_rows.h"
#include "formats/dense.h"
#include "params.h"
#include "swiglu.h"

GLM_CONST int kLaneBytes = 128;      // a lane asks for so much of a row at once
GLM_CONST int kSelectThreads = 256;  // choose for a token

// Writes logits [tokens, experts]. A simdgroup takes one row of `weight` and
// `width` tokens. The grid is (blocks of rows, blocks of tokens).
template <typename T, typename F, int width>
[[kernel]] void router_logits(
    const device T* x [[buffer(0)]],
    const device uint8_t* weight [[buffer(1)]],
    device float* logits [[buffer(2)]],
    const constant RouterParams& params [[buffer(3)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  constexpr int depth = kLaneBytes / int(sizeof(typename F::Cells));
  const int hidden = params.hidden, experts = params.experts;
  const int row = tid.x * simdgroups + simd_gid;
  if (row >= experts) {
    return;
  }
  const size_t token = size_t(tid.y) * width;
  const int used = min(width, params.tokens - int(token));
  thread int offsets[width];  // the last token's, past it
  GLM_UNROLL
  for (int m = 0; m < width; m++) {
    offsets[m] = min(m, used - 1) * hidden;
  }
  thread float result[width];
  const Matrix<F> w =
      Matrix<F>{weight, weight, weight}.at(row, 1, hidden, simd_lid);
  const Vectors<T> vectors = {x + token * hidden, offsets};
  dot_rows<Vectors<T>, F, 1, 1, width, depth>(
      &w, hidden, 1, vectors, simd_lid, result);
  GLM_UNROLL
  for (int m = 0; m < width; m++) {
    if (simd_lid == 0 && m < used) {
      logits[(token + m) * experts + row] = result[m];
    }
  }
}

METAL_FUNC float nan_as_least(float score) {
  return isnan(score) ? -INFINITY : score;
}

// Counts those of scores[begin, end) that come before entry i: the larger
// first, then the lowest index.
METAL_FUNC int
rank_of(const threadgroup float* scores, int begin, int end, int i) {
  const float score = scores[i];
  int rank = 0;
  for (int j = begin; j < end; j++) {
    rank += scores[j] > score || (scores[j] == score && j < i);
  }
  return rank;
}

// Sets the scores outside the `kept` best groups to -inf; a group is worth the
// sum of its two best scores.
template <int experts, int groups>
METAL_FUNC void keep_groups(
    threadgroup float* scores,
    threadgroup float* top,
    threadgroup float* worth,
    int kept,
    int thread_id) {
  constexpr int size = experts / groups;
  for (int e = thread_id; e < experts; e += kSelectThreads) {
    const int group = e / size;
    const int rank = rank_of(scores, group * size, (group + 1) * size, e);
    if (rank < 2) {
      top[2 * group + rank] = scores[e];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int g = thread_id; g < groups; g += kSelectThreads) {
    worth[g] = nan_as_least(top[2 * g] + top[2 * g + 1]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = thread_id; e < experts; e += kSelectThreads) {
    if (rank_of(worth, 0, groups, e / size) >= kept) {
      scores[e] = -INFINITY;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Writes chosen and shares [tokens, top_k]. A threadgroup takes a token.
template <int experts, int groups>
[[kernel, max_total_threads_per_threadgroup(kSelectThreads)]] void
router_select(
    const device float* logits [[buffer(0)]],
    const device float* correction_bias [[buffer(1)]],
    device int* chosen [[buffer(2)]],
    device float* shares [[buffer(3)]],
    const constant RouterParams& params [[buffer(4)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint thread_id [[thread_index_in_threadgroup]]) {
  threadgroup float weights[experts];
  threadgroup float scores[experts];
  threadgroup float best[experts];
  threadgroup float top[2 * groups];
  threadgroup float worth[groups];
  for (int e = thread_id; e < experts; e += kSelectThreads) {
    const float logit = logits[size_t(tid.x) * experts + e];
    weights[e] = glm_fused::sigmoid(logit, glm_fused::As<float>());
    scores[e] = nan_as_least(weights[e] + correction_bias[e]);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if constexpr (groups > 1) {
    keep_groups<experts, groups>(
        scores, top, worth, params.topk_group, thread_id);
  }

  const int top_k = params.top_k;
  for (int e = thread_id; e < experts; e += kSelectThreads) {
    const int rank = rank_of(scores, 0, experts, e);
    if (rank < top_k) {
      chosen[tid.x * top_k + rank] = e;
      best[rank] = weights[e];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int j = thread_id; j < top_k; j += kSelectThreads) {
    float total = 0;
    for (int i = 0; i < top_k; i++) {
      total = total + best[i];
    }
    total = total + 1e-20f;
    const float share = params.norm_topk_prob ? best[j] / total : best[j];
    shares[tid.x * top_k + j] = share * params.routed_scaling_factor;
  }
}
