// The splits of one head of one token, combined with the arithmetic of
// csrc/attention.h.
#pragma once

#include "numbers.h"
#include "params.h"
#include "softmax_exp.h"

// Gives y the head's columns. Its first split is at `first` of o [.., heads,
// rank], m and l [.., heads], the others every `heads` after it; `weights`
// holds a float per split. A split without keys has l = 0, any other has l >= 1
// or NaN.
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
  const int rank = params.rows.rank, splits = params.splits;
  float largest = -INFINITY;
  for (int s = 0; s < splits; s++) {
    const size_t at = first + size_t(s) * params.heads;
    largest = l[at] != 0 && m[at] > largest ? m[at] : largest;
  }
  for (int s = thread_id; s < splits; s += threads) {
    const size_t at = first + size_t(s) * params.heads;
    weights[s] = glm_fused::exp_negative(m[at] - largest);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0;
  bool any = false;
  for (int s = 0; s < splits; s++) {
    const float sum = l[first + size_t(s) * params.heads];
    any = any || sum != 0;
    total = sum != 0 ? fma(weights[s], sum, total) : total;
  }
  for (int column = thread_id; column < rank; column += threads) {
    float value = 0;
    for (int s = 0; s < splits; s++) {
      const size_t at = first + size_t(s) * params.heads;
      value =
          l[at] != 0 ? fma(weights[s], o[at * rank + column], value) : value;
    }
    y.set(column, any ? value / total : 0.0f);
  }
}
