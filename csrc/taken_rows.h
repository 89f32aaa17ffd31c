// Which rows of the memory of growing caches are taken.
//
// MLX's arrays never change, so appending to one copies it, unless nobody else
// holds it; and a step that is still on its way holds the cache. But rows that
// were never given out can be filled where they are, whoever holds the others.
#pragma once

#include "mlx/array.h"

namespace glm_fused {

// Takes rows [at, at + count) of `buffer` [b, 1, capacity, width], which is
// evaluated. Returns whether they may be written where they are: they were
// free, or nobody else holds the buffer.
bool take_rows(const mlx::core::array& buffer, int at, int count);

// Takes the first `count` rows of new memory.
void take_new_rows(const mlx::core::array& buffer, int count);

}  // namespace glm_fused
