#include "metal/limits.h"

#include "attention.h"

namespace glm_fused::metal {

namespace {

// 32 KB of threadgroup memory hold a link and up to eight terms per pair.
constexpr int kMaxPairs = 32 * 1024 / (4 + 8 * 4);
// They hold five arrays of at most this many floats.
constexpr int kMaxExperts = 1024;
// They hold a float per split.
constexpr int kMaxListed = 32 * 1024 / 4 * kSplit;

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

}  // namespace glm_fused::metal
