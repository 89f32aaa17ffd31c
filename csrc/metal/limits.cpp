#include "metal/limits.h"

#include "attention.h"
#include "metal/project.h"

namespace glm_fused::metal {

namespace {

constexpr size_t kThreadgroupMemory = 32 * 1024;
// It holds a link and up to eight terms per pair.
constexpr int kMaxPairs = kThreadgroupMemory / (4 + 8 * 4);
// It holds five arrays of at most this many floats.
constexpr int kMaxExperts = 1024;
// It holds a float per split.
constexpr int kMaxListed = kThreadgroupMemory / 4 * kSplit;

}  // namespace

std::string moe_decode_obstacle(int tokens, int top_k) {
  if (tokens > kMaxTokens) {
    return std::to_string(tokens) + " tokens are more than " +
        std::to_string(kMaxTokens);
  }
  if (const int64_t pairs = static_cast<int64_t>(tokens) * top_k;
      pairs > kMaxPairs) {
    return std::to_string(pairs) + " choices are more than " +
        std::to_string(kMaxPairs);
  }
  return "";
}

std::string router_topk_obstacle(int experts) {
  if (experts > kMaxExperts) {
    return std::to_string(experts) + " experts are more than " +
        std::to_string(kMaxExperts);
  }
  return "";
}

std::string sparse_mla_decode_obstacle(int listed) {
  if (listed > kMaxListed) {
    return std::to_string(listed) + " listed keys are more than " +
        std::to_string(kMaxListed);
  }
  return "";
}

int unembed_vectors(int tokens, int listed, int rank, size_t itemsize) {
  const size_t splits = threadgroup_bytes((listed + kSplit - 1) / kSplit + 1);
  int width = vectors(tokens);
  while (width > 0 &&
         splits + threadgroup_bytes((width * rank * itemsize + 3) / 4) >
             kThreadgroupMemory) {
    width /= 2;
  }
  return width;
}

}  // namespace glm_fused::metal
