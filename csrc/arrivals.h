// Slots that are filled while a kernel works on those that already are.
#pragma once

#include <vector>

namespace glm_fused {

class Arrivals {
 public:
  virtual ~Arrivals() = default;

  // Moves the slots that are filled out of `pending`, which must not be empty,
  // and returns them; waits until there is one. Throws std::runtime_error when
  // a slot of `pending` cannot be filled.
  virtual std::vector<int> take(std::vector<int>& pending) = 0;
};

}  // namespace glm_fused
