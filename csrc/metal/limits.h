// Tells what the Metal kernels take on.
#pragma once

#include <string>

namespace glm_fused::metal {

// Longer batches are MLX's own: its matrix kernels pay off there.
constexpr int kMaxTokens = 16;

// Tells why an op cannot run on the GPU, or "" when it can.
std::string moe_decode_obstacle(int tokens, int top_k);
std::string router_topk_obstacle(int experts);
std::string sparse_mla_decode_obstacle(int listed);

}  // namespace glm_fused::metal
