// Tells what the Metal kernels take on.
#pragma once

#include <cstddef>
#include <string>

namespace glm_fused::metal {

// Longer batches are MLX's own: its matrix kernels pay off there.
constexpr int kMaxTokens = 16;

// Tells why an op cannot run on the GPU, or "" when it can.
std::string moe_decode_obstacle(int tokens, int top_k);
std::string router_topk_obstacle(int experts);
std::string sparse_mla_decode_obstacle(int listed);

// Tells whether a prompt's attention takes rows so wide, and whether its
// indexer takes keys of so many dimensions.
bool mla_prompt_takes(int rank, int rope);
bool index_prompt_takes(int dim);

// Gives the bytes of scratch memory with which indexer_topk takes so many
// queries of a sequence.
size_t index_scratch_bytes(int queries, int keys, int top_k);

// Gives how many of the tokens' vectors of `rank` values fit in threadgroup
// memory beside a float for each split of `listed` keys: a power of two, 0
// where not even one fits.
int unembed_vectors(int tokens, int listed, int rank, size_t itemsize);

}  // namespace glm_fused::metal
