#define GLM_AVX2
#include "cpu/attention/attention_body.h"

namespace glm_fused::cpu {

const AttentionKernels& avx2_attention() {
  static constexpr AttentionKernels table = attention_table("avx2");
  return table;
}

}  // namespace glm_fused::cpu
