// Tells what can be known of integers before their graph is evaluated.
#pragma once

#include <cstdint>
#include <optional>

#include "mlx/array.h"

namespace glm_fused {

// Returns whether the values can be read in place now. In a graph that is being
// traced they cannot, as its later runs have others.
bool is_readable(const mlx::core::array& a);

// Returns whether all of `ids` are sure to be from 0 to bound - 1: they are
// known, or parts of what is known, or indices of so many scores or experts.
// What MLX has begun to evaluate has no graph to look at.
bool known_below(const mlx::core::array& ids, int64_t bound);

// Returns the array, which MLX is computing already, whose values in their
// order those of `ids` are, if that is so.
std::optional<mlx::core::array> being_computed(const mlx::core::array& ids);

}  // namespace glm_fused
