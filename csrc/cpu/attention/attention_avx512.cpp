#define GLM_AVX512
#include "cpu/attention/attention_body.h"

namespace glm_fused::cpu {

const AttentionKernels& avx512_attention() {
  static constexpr AttentionKernels table = attention_table("avx512");
  return table;
}

}  // namespace glm_fused::cpu
