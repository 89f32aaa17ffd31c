// What sparse_mla_decode takes and gives, for the fused path and the reference.
#pragma once

#include <optional>

#include "cpu/attention/cached_rows.h"

namespace glm_fused::cpu {

struct Mla {
  const mx::array& q;             // [b, l, heads, rank + rope]
  const mx::array& start;         // [b] int32
  RowArray latents;               // [b, t, row]
  std::optional<RowArray> ropes;  // [b, t, rope]
  const mx::array* selected;      // [b, l, k] int32, or null: every visible key
  RowLayout layout;
  float scale;
  mx::array& y;  // [b, l, heads, rank] float32

  int queries() const {
    return q.shape(1);
  }
  int heads() const {
    return q.shape(2);
  }
  size_t row(int b, int i) const {
    return static_cast<size_t>(b) * queries() + i;
  }
  float* out(int b, int i) const {
    return y.data<float>() + row(b, i) * heads() * layout.rank;
  }
  Rows rows(int b) const {
    return cached_rows(layout, latents, ropes ? &*ropes : nullptr, b);
  }
  Visible visible(int b) const {
    return {start, b, latents.keys(), queries()};
  }
  // Returns how many entries a query's list of keys has at most.
  int list_size() const {
    return selected ? selected->shape(2) : latents.keys();
  }
  // Returns the most that this is in any run.
  int most_listed() const {
    return selected ? selected->shape(2) : latents.most_keys();
  }
  // A query's list of keys. Entry j is -1 where it is no visible key.
  struct List {
    const int32_t* selected;  // null: every visible key
    int low, high;

    int operator[](int j) const {
      const int key = selected ? selected[j] : low + j;
      return key >= low && key < high ? key : -1;
    }
  };
  List list(int b, int i) const {
    const Visible v = visible(b);
    const int32_t* entries = selected
        ? selected->data<int32_t>() + row(b, i) * list_size()
        : nullptr;
    return {entries, v.low, v.high(i)};
  }
};

}  // namespace glm_fused::cpu
