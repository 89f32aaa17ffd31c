// The keys that a split of a token's list holds.
#pragma once

#include "cached_rows.h"

GLM_CONST int kSplit = 64;  // list entries

// Gives entry `entry` of a token's list of keys, -1 where no such key is
// visible.
METAL_FUNC int listed_key(
    const device int* selected,
    const constant MlaParams& params,
    Visible visible,
    int token,
    int entry) {
  int key = visible.low + entry;
  if (params.listed > 0) {
    key = entry < params.listed
        ? selected[size_t(token) * params.listed + entry]
        : -1;
  }
  return key >= visible.low && key < visible.high ? key : -1;
}

// Lists a split's visible keys, in order, and gives their number.
METAL_FUNC int list_keys(
    const device int* selected,
    const constant MlaParams& params,
    Visible visible,
    int token,
    int first,
    threadgroup int* list,
    int simdgroup,
    int lane) {
  int count = 0;
  for (int i = 0; i < kSplit; i += kLanes) {
    const int key =
        listed_key(selected, params, visible, token, first + i + lane);
    const int listed = key >= 0;
    const int place = count + simd_prefix_exclusive_sum(listed);
    if (listed != 0 && simdgroup == 0) {
      list[place] = key;
    }
    count += simd_sum(listed);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return count;
}
