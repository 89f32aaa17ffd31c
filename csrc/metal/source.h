// The shaders' text, one self-contained source each; written at build time by
// metal/flatten.py.
#pragma once

namespace glm_fused::metal_source {

extern const char* const indexer_topk;
extern const char* const moe_decode;
extern const char* const moe_reference;
extern const char* const router_topk;
extern const char* const sparse_mla_decode;

}  // namespace glm_fused::metal_source
