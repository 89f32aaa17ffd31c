// The cached rows of a graph node's inputs, one sequence at a time.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "row_layout.h"

namespace glm_fused::cpu {

// The rows of `a` [b, t, width]: in place where their values are contiguous, as
// a growing cache's are, else copied.
class RowArray {
 public:
  explicit RowArray(const mx::array& a)
      : array_(a),
        batch_(a.strides(0) * a.itemsize()),
        row_(a.strides(1) * a.itemsize()) {
    if (a.strides(2) != 1 && a.shape(2) > 1) {
      copy();
    }
  }

  int keys() const {
    return array_.shape(1);
  }
  FloatType type() const {
    return float_type_of(array_.dtype());
  }
  const uint8_t* data(int b) const {
    return (copy_.empty() ? array_.data<uint8_t>() : copy_.data()) + b * batch_;
  }
  size_t stride() const {
    return row_;
  }

 private:
  void copy() {
    const size_t size = array_.itemsize(), rows = array_.shape(1);
    const auto* from = array_.data<uint8_t>();
    for (int b = 0; b < array_.shape(0); b++) {
      for (size_t i = 0; i < rows; i++) {
        for (int c = 0; c < array_.shape(2); c++) {
          const auto* value = from + b * batch_ + i * row_ +
              c * array_.strides(2) * static_cast<int64_t>(size);
          copy_.insert(copy_.end(), value, value + size);
        }
      }
    }
    row_ = array_.shape(2) * size;
    batch_ = rows * row_;
  }

  const mx::array& array_;
  int64_t batch_, row_;
  std::vector<uint8_t> copy_;
};

// Sequence b; `ropes` is null where the rows have no RoPE part or carry it
// packed.
inline Rows cached_rows(
    const RowLayout& layout,
    const RowArray& latents,
    const RowArray* ropes,
    int b) {
  const bool floating = layout.format == RowFormat::floating;
  return {
      layout.format,
      floating ? latents.type() : FloatType::bfloat16,
      ropes ? ropes->type() : FloatType::bfloat16,
      layout.rank,
      layout.rope,
      latents.data(b),
      latents.stride(),
      ropes ? ropes->data(b) : nullptr,
      ropes ? ropes->stride() : 0};
}

// Which keys the queries of sequence b see: query i of l sees [low, high(i)).
struct Visible {
  int low, first;  // `first` is query 0's own column

  Visible(const mx::array& start, int b, int keys, int queries)
      : low(std::clamp(start.data<int32_t>()[b], 0, keys)),
        first(keys - queries) {}
  int high(int i) const {
    return std::max(low, first + i + 1);
  }
};

}  // namespace glm_fused::cpu
