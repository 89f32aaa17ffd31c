// The inputs of a block, as one list of arrays.
#pragma once

#include <bit>
#include <cstdint>

#include "ops/block.h"
#include "primitives.h"

namespace glm_fused {

// What chains capture, as parts of their keys.
inline int64_t key_of(float value) {
  return std::bit_cast<int32_t>(value);
}
inline int64_t key_of(const FormatSpec* spec) {
  return static_cast<int64_t>(reinterpret_cast<intptr_t>(spec));
}

// Takes apart the inputs of a chain, in their order.
class Inputs {
 public:
  explicit Inputs(const Arrays& all) : all_(all) {}

  const mx::array& array() {
    return all_[next_++];
  }
  Weight weight(const FormatSpec* spec) {
    const auto first = all_.begin() + static_cast<std::ptrdiff_t>(next_);
    next_ += spec->plane_count;
    return {{first, first + spec->plane_count}, spec};
  }

 private:
  const Arrays& all_;
  size_t next_ = 0;
};

inline void append(Arrays& inputs, const Weight& w) {
  inputs.insert(inputs.end(), w.planes.begin(), w.planes.end());
}

inline void append(Arrays& inputs, const Norm& norm) {
  inputs.push_back(norm.weight);
}

}  // namespace glm_fused
