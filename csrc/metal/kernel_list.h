// What is known of the kernels that have been compiled, for reports.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace glm_fused::metal {

struct ListedKernel {
  std::string name;
  int most_threads;       // of a threadgroup
  int threadgroup_bytes;  // that are the kernel's own
  double seconds;         // that it took to be compiled
};

// Returns those that have been compiled, in their order.
std::vector<ListedKernel> listed_kernels();
// Returns how many launches were encoded since the last call.
int64_t take_launches();

}  // namespace glm_fused::metal
