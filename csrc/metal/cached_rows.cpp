#include "metal/cached_rows.h"

namespace glm_fused::metal {

namespace {

constexpr int kChunk = 8;  // values that a thread loads at once

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

int load_unit(
    const RowLayout& layout,
    const mx::array& latents,
    const mx::array* ropes,
    const RowsParams& rows,
    uint64_t queries) {
  if (rows.rank % kChunk != 0 || rows.rope % kChunk != 0) {
    return 0;
  }
  uint64_t places =
      queries | latents.offset() | rows.latent_stride | rows.latent_sequence;
  if (ropes) {
    places |= ropes->offset() | rows.rope_stride | rows.rope_sequence;
  } else if (rows.rope > 0) {
    places |= rows.rank + 4 * scale_count(layout.format, rows.rank);
  }
  for (const int unit : {16, 8, 4}) {
    if (places % unit == 0) {
      return unit;
    }
  }
  return 0;
}

}  // namespace glm_fused::metal
