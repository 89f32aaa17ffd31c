// Each shader's text is one self-contained source, which metal/flatten.py
// writes at build time.
#pragma once

namespace glm_fused::metal_source {

extern const char* const attention_queries;
extern const char* const grouped_experts;
extern const char* const index_prompt;
extern const char* const indexer_topk;
extern const char* const mla_prompt;
extern const char* const mla_unembed;
extern const char* const moe_decode;
extern const char* const norms;
extern const char* const project;
extern const char* const expert_sum;
extern const char* const append_rows;
extern const char* const rotate;
extern const char* const router_topk;
extern const char* const sparse_mla_decode;

}  // namespace glm_fused::metal_source
