// Cached rows as the shaders see them.
#pragma once

#include "metal/params.h"
#include "metal/pipelines.h"
#include "row_layout.h"

namespace glm_fused::metal {

// Gives the place of rows of `layout` in `latents` and, if there, `ropes`.
// Throws unless the last axis is contiguous; `queries` is per sequence.
RowsParams rows_params(
    const RowLayout& layout,
    const mx::array& latents,
    const mx::array* ropes,
    int queries);

}  // namespace glm_fused::metal
