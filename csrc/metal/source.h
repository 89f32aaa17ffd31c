// The shaders' text, one self-contained source each; written at build time by
// metal/flatten.py.
#pragma once

namespace glm_fused::metal_source {

extern const char* const moe_decode;
extern const char* const moe_reference;
extern const char* const router_topk;

}  // namespace glm_fused::metal_source
