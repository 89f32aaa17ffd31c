// Packs rows of values into a cache. A simdgroup takes the values that share a
// scale; of each row another one takes the RoPE values. The grid is (scales +
// 1, rows).
#pragma once

#include "numbers.h"
#include "packing.h"
#include "view.h"

// Stores the low bytes of a number, one by one: rows may begin anywhere.
METAL_FUNC void
store_bytes(device uint8_t* to, long stride, uint number, int count) {
  for (int i = 0; i < count; i++) {
    to[i * stride] = static_cast<uint8_t>(number >> (8 * i));
  }
}

template <typename T, typename Packing>
[[kernel, max_total_threads_per_threadgroup(kLanes)]] void pack_rows(
    const device T* values [[buffer(0)]],
    const device T* ropes [[buffer(1)]],
    device uint8_t* to [[buffer(2)]],
    const constant PackParams& params [[buffer(3)]],
    uint2 at [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]]) {
  const int part = at.x, row = at.y, rank = params.values.columns;
  const long stride = params.to.column_stride;
  to += row_offset(params.to, row);
  if (part == params.scales) {
    ropes += row_offset(params.ropes, row);
    to += (rank + 4 * params.scales) * stride;
    for (int i = lane; i < params.ropes.columns; i += kLanes) {
      const bfloat16_t value = static_cast<bfloat16_t>(
          static_cast<float>(ropes[i * params.ropes.column_stride]));
      store_bytes(to + 2 * i * stride, stride, as_type<ushort>(value), 2);
    }
    return;
  }
  values += row_offset(params.values, row);
  const long step = params.values.column_stride;
  const int begin = part * params.tile, end = min(begin + params.tile, rank);
  uint largest = 0;  // among magnitudes bits are ordered as they are
  for (int i = begin + lane; i < end; i += kLanes) {
    const float value = static_cast<float>(values[i * step]);
    largest = max(largest, glm_fused::bits_of(value) & 0x7fffffffu);
  }
  const float scale = glm_fused::float_of(simd_max(largest)) / Packing::most();
  const float divisor = scale == 0.0f ? 1.0f : scale;
  for (int i = begin + lane; i < end; i += kLanes) {
    const float value = static_cast<float>(values[i * step]);
    to[i * stride] = Packing::code(value / divisor);
  }
  if (lane == 0) {
    to += (rank + 4 * part) * stride;
    store_bytes(to, stride, glm_fused::bits_of(scale), 4);
  }
}
