// What is known of the kernels that have been used, for reports.
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
// Returns how often one was asked for since the last call: for one token, how
// many launches there were.
int64_t take_uses();

}  // namespace glm_fused::metal
