// What can be told of integers before their graph is evaluated.
#pragma once

#include <cstdint>

#include "mlx/array.h"

namespace glm_fused {

// Whether the values can be read in place now. Of a graph that is being traced
// they are not those of its later runs.
bool is_readable(const mlx::core::array& a);

// Whether all of `ids` are sure to be from 0 to bound - 1: they are known, or
// parts of what is, or indices of so many scores or experts. MLX keeps no graph
// of what it has begun to evaluate.
bool known_below(const mlx::core::array& ids, int64_t bound);

}  // namespace glm_fused
