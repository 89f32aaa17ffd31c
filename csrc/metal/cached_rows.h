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

// Gives how many bytes of rows, and of queries from byte `queries` of their
// array on, a shader reads at once (metal/row_chunks.h): 16, 8 or 4, or 0 where
// chunks begin at no such multiple, or are not all latent or all RoPE key.
int load_unit(
    const RowLayout& layout,
    const mx::array& latents,
    const mx::array* ropes,
    const RowsParams& rows,
    uint64_t queries = 0);

}  // namespace glm_fused::metal
