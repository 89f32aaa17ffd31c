// Kernels are compiled at run time; this does it before they are needed.
#pragma once

#include <functional>
#include <vector>

#include "mlx/mlx.h"

namespace glm_fused::metal {

// Compiles the kernels that the evaluation of `outputs` launches on Metal, but
// for those that are there already, and returns how many that were. Nothing is
// evaluated. `progress` is told how many are done, from 0 on, and of how many.
int compile_kernels(
    const std::vector<mlx::core::array>& outputs,
    const std::function<void(int, int)>& progress);

}  // namespace glm_fused::metal
