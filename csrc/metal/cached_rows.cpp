#include "metal/cached_rows.h"

namespace glm_fused::metal {

namespace {

long stride(const mx::array& rows, int axis) {
  if (rows.strides(2) != 1 && rows.shape(2) > 1) {
    throw std::invalid_argument(
        "[metal] cached rows must be contiguous along their last axis.");
  }
  return rows.strides(axis) * static_cast<long>(rows.itemsize());
}

}  // namespace

RowsParams rows_params(
    const RowLayout& layout,
    const mx::array& latents,
    const mx::array* ropes,
    int queries) {
  return {
      latents.shape(1),
      queries,
      layout.rank,
      layout.rope,
      stride(latents, 1),
      ropes ? stride(*ropes, 1) : 0,
      stride(latents, 0),
      ropes ? stride(*ropes, 0) : 0};
}

}  // namespace glm_fused::metal
