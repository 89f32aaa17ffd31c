// Gradients of an op from the same computation in MLX's own ops.
#pragma once

#include <functional>
#include <vector>

#include "mlx/mlx.h"

namespace glm_fused {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;
using Chain = std::function<mx::array(const Arrays&)>;

// The gradients of `chain`, which computes `cotangent`'s output from `primals`.
// Integers, such as the experts that were chosen, have none: zeros.
Arrays differentiate(
    const Chain& chain,
    const Arrays& primals,
    const mx::array& cotangent,
    const std::vector<int>& argnums);

mx::array as_float32(const mx::array& a, const mx::Stream& s);

}  // namespace glm_fused
