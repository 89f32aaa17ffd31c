#include "cpu/attention/attention_body.h"

namespace glm_fused::cpu {

const AttentionKernels& portable_attention() {
  static constexpr AttentionKernels table = attention_table("portable");
  return table;
}

}  // namespace glm_fused::cpu
