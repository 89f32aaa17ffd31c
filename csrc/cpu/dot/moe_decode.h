// What moe_decode takes and gives, for the fused path and the reference.
#pragma once

#include "cpu/dot/matrix.h"

namespace glm_fused::cpu {

struct Moe {
  const mlx::core::array& x;       // [tokens, hidden]
  const mlx::core::array& slots;   // [tokens, top_k] int32
  const mlx::core::array& scores;  // [tokens, top_k] float32
  const Matrix gate;               // [slots, intermediate, hidden]
  const Matrix up;
  const Matrix down;    // [slots, hidden, intermediate]
  mlx::core::array& y;  // [tokens, hidden]
  FloatType type;       // that of x and y
};

}  // namespace glm_fused::cpu
