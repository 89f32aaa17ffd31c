// The splits of sparse_mla_decode, which its op and a block combine each in
// their own way.
#pragma once

#include <functional>

#include "metal/params.h"
#include "mlx/mlx.h"
#include "row_layout.h"

namespace glm_fused::metal {

namespace mx = mlx::core;

// The inputs of a SparseMlaDecode, whose ropes and selection may be null.
struct Attended {
  const mx::array &q, &start, &latents;
  const mx::array *ropes, *selected;
  RowLayout layout;
  float scale;
};

// Encodes what is done with o, m and l of the first `tokens` that they hold,
// which are those from params.first_token on.
using Combine = std::function<void(
    const mx::array& o,
    const mx::array& m,
    const mx::array& l,
    const MlaParams& params,
    int tokens)>;

// Encodes the splits of all tokens, as many at a time as fit in memory, and
// calls `combine` after each.
void attend(
    const mx::Stream& stream,
    const Attended& a,
    const Combine& combine);

// Encodes the same for a prompt's queries, to y [b, l, heads, rank].
void attend_prompt(const mx::Stream& stream, const Attended& a, mx::array& y);

}  // namespace glm_fused::metal
