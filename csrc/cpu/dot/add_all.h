// Sums of arrays' elements.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cpu/dot/matrix.h"

namespace glm_fused::cpu {

// Computes out = x + y, floats of one shape that lie back to back; each sum is
// rounded once.
struct AddAll {
  const mlx::core::array &x, &y;
  mlx::core::array& out;

  void run() const {
    constexpr size_t kValues = 4096;  // so many are loaded at once
    float a[kValues], b[kValues];
    for (size_t at = 0; at < out.size(); at += kValues) {
      const int count = static_cast<int>(std::min(kValues, out.size() - at));
      load_values(x, at, count, a);
      load_values(y, at, count, b);
      for (int i = 0; i < count; i++) {
        a[i] = a[i] + b[i];
      }
      store_row(out, at, a, count);
    }
  }
};

}  // namespace glm_fused::cpu
