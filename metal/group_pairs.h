// Pairs of a token and one of its choices, in order of their slots.
#pragma once

#include "numbers.h"
#include "params.h"

// The pairs of a slot: [first, first + count) of those in order.
struct PairGroup {
  int first;
  int count;
};

GLM_CONST int kSortSimdgroups = 8;

// Gives the group of a pair, the last one if its slot is none.
METAL_FUNC int group_of(const device int* slots, int pair, int bank) {
  const int slot = slots[pair];
  return slot < 0 ? bank : min(slot, bank);
}

// Writes the pairs' numbers in order of their slots, and those of a slot in
// their own order, and the group of each of params.bank slots. One more group
// holds the pairs whose slot is none. A threadgroup places the pairs of one
// group.
[[kernel, max_total_threads_per_threadgroup(kSortSimdgroups* kLanes)]] void
group_pairs(
    const device int* slots [[buffer(0)]],
    device int* order [[buffer(1)]],
    device PairGroup* groups [[buffer(2)]],
    const constant MoeParams& params [[buffer(3)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
  threadgroup int before[kSortSimdgroups];  // pairs of earlier groups
  threadgroup int own[kSortSimdgroups];
  const int pairs = params.tokens * params.top_k, bank = params.bank;
  const int group = tid.x, simdgroup = simd_gid, lane = simd_lid;
  const int each = (pairs + kSortSimdgroups - 1) / kSortSimdgroups;
  const int first = simdgroup * each, end = min(first + each, pairs);
  int earlier = 0, count = 0;
  for (int pair = first + lane; pair < end; pair += kLanes) {
    const int found = group_of(slots, pair, bank);
    earlier += found < group;
    count += found == group;
  }
  earlier = simd_sum(earlier);
  count = simd_sum(count);
  if (lane == 0) {
    before[simdgroup] = earlier;
    own[simdgroup] = count;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  int start = 0, all = 0, place = 0;
  GLM_UNROLL
  for (int i = 0; i < kSortSimdgroups; i++) {
    start += before[i];
    place += i < simdgroup ? own[i] : 0;
    all += own[i];
  }
  if (simdgroup == 0 && lane == 0) {
    groups[group] = {start, all};
  }
  place += start;
  for (int pair = first; pair < end; pair += kLanes) {
    const int fits =
        pair + lane < end && group_of(slots, pair + lane, bank) == group;
    const int at = place + simd_prefix_exclusive_sum(fits);
    if (fits != 0) {
      order[at] = pair + lane;
    }
    place += simd_sum(fits);
  }
}
