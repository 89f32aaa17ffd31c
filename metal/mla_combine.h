// The splits of one head of one token, combined with the arithmetic of
// csrc/attention.h.
#pragma once

#include "numbers.h"
#include "params.h"
#include "softmax_exp.h"

// A thread asks for so many splits before it needs any of them.
GLM_CONST int kSplitsAtOnce = 8;

METAL_FUNC float part_of(float value, int) {
  return value;
}

METAL_FUNC float part_of(float4 value, int i) {
  return value[i];
}

// The splits of a head: the first one's row of o [.., rank], its m and its l,
// the others' `heads` rows after it each. `weights` holds a float per split,
// less than 0 for one without keys; that has l = 0, any other l >= 1 or NaN.
struct Splits {
  const device float* o;
  const device float* m;
  const device float* l;
  threadgroup float* weights;
  int count;
  int heads;
  int rank;

  METAL_FUNC void weigh(int thread_id, int threads) const thread {
    float largest = -INFINITY;
    for (int s = thread_id % kLanes; s < count; s += kLanes) {
      const size_t at = size_t(s) * heads;
      largest = l[at] != 0 ? larger(largest, m[at]) : largest;
    }
    largest = simd_max(largest);
    for (int s = thread_id; s < count; s += threads) {
      const size_t at = size_t(s) * heads;
      weights[s] =
          l[at] != 0 ? glm_fused::exp_negative(m[at] - largest) : -1.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Gives the sum of weights times x, where each split's x is `step` after the
  // one before it.
  template <typename V>
  METAL_FUNC V sum(const device V* x, int step) const thread {
    V value = V(0.0f);
    for (int first = 0; first < count; first += kSplitsAtOnce) {
      thread V parts[kSplitsAtOnce];
      thread float own[kSplitsAtOnce];
      GLM_UNROLL
      for (int i = 0; i < kSplitsAtOnce; i++) {
        own[i] = first + i < count ? weights[first + i] : -1.0f;
        if (!(own[i] < 0)) {
          parts[i] = x[size_t(first + i) * step];
        }
      }
      GLM_UNROLL
      for (int i = 0; i < kSplitsAtOnce; i++) {
        if (!(own[i] < 0)) {
          value = fma(V(own[i]), parts[i], value);
        }
      }
    }
    return value;
  }

  // Gives y a thread's columns; `total` is 0 where no split has a key.
  template <typename V, typename Y>
  METAL_FUNC void divide(
      float total,
      int thread_id,
      int threads,
      const thread Y& y) const thread {
    constexpr int each = sizeof(V) / sizeof(float);
    const device V* x = (const device V*)o;
    for (int i = thread_id; i < rank / each; i += threads) {
      const V value = sum(x + i, heads * (rank / each));
      GLM_UNROLL
      for (int j = 0; j < each; j++) {
        y.set(i * each + j, total != 0 ? part_of(value, j) / total : 0.0f);
      }
    }
  }
};

// Gives y the columns of the head whose first split is at `first` of o [..,
// heads, rank], m and l [.., heads].
template <typename Y>
METAL_FUNC void combine_splits(
    const device float* o,
    const device float* m,
    const device float* l,
    const constant MlaParams& params,
    size_t first,
    threadgroup float* weights,
    int thread_id,
    int threads,
    const thread Y& y) {
  const int rank = params.rows.rank;
  const Splits splits = {
      o + first * rank,
      m + first,
      l + first,
      weights,
      params.splits,
      params.heads,
      rank};
  splits.weigh(thread_id, threads);
  const float total = splits.sum(l + first, params.heads);
  if (rank % 4 == 0) {
    splits.template divide<float4>(total, thread_id, threads, y);
  } else {
    splits.template divide<float>(total, thread_id, threads, y);
  }
}
