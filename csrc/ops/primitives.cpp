#include "primitives.h"

#include <stdexcept>

namespace glm_fused {

std::vector<mx::array> weak_copies(const std::vector<mx::array>& arrays) {
  std::vector<mx::array> copies;
  copies.reserve(arrays.size());
  for (const auto& a : arrays) {
    copies.push_back(mx::array::unsafe_weak_copy(a));
  }
  return copies;
}

void FusedPrimitive::eval_gpu(
    const std::vector<mx::array>&,
    std::vector<mx::array>&) {
  throw std::runtime_error(
      "[" + std::string(name()) +
      "] has no GPU kernel in this build; "
      "run it on a CPU stream.");
}

}  // namespace glm_fused
