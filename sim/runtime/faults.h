// Makes a fault in shader code an error of its launch.
#pragma once

#include <memory>

namespace sim {

// While it lives, faults of fibers on this OS thread are caught.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  struct Stack;
  std::unique_ptr<Stack> stack_;
};

}  // namespace sim
