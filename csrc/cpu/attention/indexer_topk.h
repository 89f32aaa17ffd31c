// What indexer_topk takes and gives, for the fused path and the reference.
#pragma once

#include "cpu/attention/cached_rows.h"

namespace glm_fused::cpu {

struct Indexer {
  const mx::array& q;        // [b, l, heads, dim]
  RowArray keys;             // [b, t, row]
  const mx::array& weights;  // [b, l, heads] float32
  const mx::array& start;    // [b] int32
  RowLayout layout;
  float scale;
  mx::array& selected;  // [b, l, k] int32

  int queries() const {
    return q.shape(1);
  }
  int heads() const {
    return q.shape(2);
  }
  int dim() const {
    return q.shape(3);
  }
  int k() const {
    return selected.shape(2);
  }
  size_t row(int b, int i) const {
    return static_cast<size_t>(b) * queries() + i;
  }
  int32_t* out(int b, int i) const {
    return selected.data<int32_t>() + row(b, i) * k();
  }
  Rows rows(int b) const {
    return cached_rows(layout, keys, nullptr, b);
  }
  Visible visible(int b) const {
    return {start, b, keys.keys(), queries()};
  }
};

// Writes all of [low, high), then -1 up to k entries; high - low <= k.
inline void select_all(int low, int high, int k, int32_t* out) {
  for (int i = 0; i < k; i++) {
    out[i] = i < high - low ? low + i : -1;
  }
}

}  // namespace glm_fused::cpu
