// The stacks of fibers, and the switch from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory.h"

// Saves the callee-saved registers on the running stack and takes up another.
extern "C" void sim_switch(void** save, void* next);

namespace sim {

constexpr uint64_t kStack = 64 * 1024;

// Prepares a stack; the first switch to it enters `entry`.
void* fresh_stack(uint8_t* top, void (*entry)());

// A stack for every thread of a threadgroup, each above a guard page.
class Stacks {
 public:
  explicit Stacks(size_t count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // The tops are staggered, so that they do not all fall into the same cache
  // sets.
  uint8_t* top(size_t i) const {
    return base_ + (i + 1) * (kStack + kPage) - i % 16 * 256;
  }
  bool contains(uint64_t address) const {
    return address - uint64_t(base_) < size_;
  }
  bool guards(uint64_t address) const {
    return contains(address) &&
        (address - uint64_t(base_)) % (kStack + kPage) < kPage;
  }

 private:
  uint8_t* base_;
  size_t size_;
};

}  // namespace sim
