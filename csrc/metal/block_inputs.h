// What the launchers of blocks share.
#pragma once

#include <vector>

#include "metal/experts.h"
#include "metal/project.h"

namespace glm_fused::metal {

// Takes a block's inputs in their order.
class Inputs {
 public:
  explicit Inputs(const std::vector<mx::array>& all) : next_(all.data()) {}

  const mx::array& array() {
    return *next_++;
  }
  const mx::array* planes(const Format& format) {
    const mx::array* first = next_;
    next_ += format.spec->plane_count;
    return first;
  }
  MlpWeights mlp(const MlpFormats& f) {
    const auto *gate = planes(f.gate), *up = planes(f.up);
    return {gate, up, planes(f.down), f};
  }

 private:
  const mx::array* next_;
};

// A product whose rows lie back to back, [tokens, n].
inline Product
in_rows(const mx::array* planes, const Format& format, mx::array& y) {
  return {planes, &format, &y, planes->shape(-2), 0};
}

// Gives memory to the outputs; returns whether the first one has any values.
inline bool allocate(std::vector<mx::array>& outputs) {
  for (auto& output : outputs) {
    allocate(output);
  }
  return outputs[0].size() > 0;
}

}  // namespace glm_fused::metal
