// Gives the cached rows of a graph node's inputs, one sequence at a time.
#pragma once

#include <algorithm>
#include <span>

#include "checks.h"
#include "cpu/runtime/scratch.h"
#include "row_layout.h"

namespace glm_fused::cpu {

// The rows of `a` [b, t, width]: in place where their values are contiguous, as
// a growing cache's are, else copied. With `filled` only so many of them are
// there, another number in every run of a kernel.
class RowArray {
 public:
  RowArray(const mx::array& a, Scratch& scratch, const int* filled = nullptr)
      : array_(a),
        filled_(filled),
        batch_(a.strides(0) * a.itemsize()),
        row_(a.strides(1) * a.itemsize()) {
    if (a.strides(2) != 1 && a.shape(2) > 1) {
      copy_ = scratch.take<uint8_t>(a.nbytes());
      row_ = a.shape(2) * a.itemsize();
      batch_ = a.shape(1) * row_;
    }
  }

  // Makes the copy, if one is needed; the array must be evaluated by now.
  void load() const {
    if (copy_.empty()) {
      return;
    }
    const mx::array& a = array_;
    const auto size = static_cast<int64_t>(a.itemsize());
    const auto* from = a.data<uint8_t>();
    uint8_t* to = copy_.data();
    for (int b = 0; b < a.shape(0); b++) {
      for (int i = 0; i < a.shape(1); i++) {
        for (int c = 0; c < a.shape(2); c++) {
          const int64_t at =
              b * a.strides(0) + i * a.strides(1) + c * a.strides(2);
          to = std::copy_n(from + at * size, size, to);
        }
      }
    }
  }

  int keys() const {
    return filled_ ? *filled_ : most_keys();
  }
  int most_keys() const {
    return array_.shape(1);
  }
  FloatType type() const {
    return float_type_of(array_.dtype());
  }
  const uint8_t* data(int b) const {
    const uint8_t* first =
        copy_.empty() ? array_.data<uint8_t>() : copy_.data();
    return first + b * batch_;
  }
  size_t stride() const {
    return row_;
  }

 private:
  const mx::array& array_;
  const int* filled_;
  int64_t batch_, row_;
  std::span<uint8_t> copy_;
};

// Returns the rows of sequence b; `ropes` is null where the rows have no RoPE
// part or carry it packed.
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

// The keys that the queries of sequence b see: query i of l sees [low,
// high(i)).
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
