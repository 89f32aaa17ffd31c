// Arrivals are slots that are filled while a kernel works on those that already
// are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <vector>

namespace glm_fused {

class Arrivals {
 public:
  virtual ~Arrivals() = default;

  // Keeps the slots from being overwritten from now until `end`, and rewrites
  // those of `slots` that have changed since the graph ran up to here. Returns
  // false if what the kernel computes is lost already, so that it need not run.
  // Throws std::runtime_error when there are no slots to be had.
  virtual bool begin(int32_t* slots, size_t count) = 0;

  // Moves the slots that are filled out of `pending`, which must not be empty,
  // and returns them; waits until there is one. Throws std::runtime_error when
  // a slot of `pending` cannot be filled.
  virtual std::vector<int> take(std::vector<int>& pending) = 0;

  // Does all of it for a kernel that cannot wait: writes the slots of experts
  // [tokens, top_k], and returns once they are filled. What fails is
  // remembered, and the slots are then any that there are. `end` is to follow.
  virtual void fill(
      const int32_t* experts,
      int tokens,
      int top_k,
      int32_t* slots) noexcept = 0;

  // The kernel calls `end` when it has run, or `failed` in place of throwing:
  // whoever enqueues while a task throws loses memory that the next one writes
  // to (slots/ops.cpp, Verify).
  virtual void end() = 0;
  virtual void failed(const std::exception& error) noexcept = 0;
};

}  // namespace glm_fused
