// The lightning indexer with the arithmetic of csrc/attention.h: one launch
// computes scores, another selects the largest exactly.
#pragma once

#include "cached_rows.h"

GLM_CONST int kScoreThreads = 128;
GLM_CONST int kScoreKeys = 2 * kScoreThreads;  // a threadgroup scores so many
GLM_CONST int kKeyPitch = kScoreKeys + 1;
GLM_CONST int kHeads = 32;  // so many are scored together
GLM_CONST int kDims = 16;   // so many are in threadgroup memory at once

// Gives words that compare as the scores do: -0 as 0, NaN as -infinity.
METAL_FUNC uint ordered(float score) {
  const uint bits = as_type<uint>(isnan(score) ? -INFINITY : score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

METAL_FUNC float relu(float x) {
  return x < 0 ? 0.0f : x;  // a NaN stays one
}

// Writes words [queries of this dispatch, keys], those of visible keys only.
// The grid is (blocks of keys, queries).
template <typename T, typename R>
[[kernel]] void index_scores(
    const device T* q [[buffer(0)]],
    const device float* weights [[buffer(1)]],
    const device uint8_t* keys [[buffer(2)]],
    const device int* start [[buffer(3)]],
    device uint* words [[buffer(4)]],
    const constant IndexParams& params [[buffer(5)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
  threadgroup float k[kDims * kKeyPitch];     // [dims, keys]
  threadgroup float queries[kDims * kHeads];  // [dims, heads]
  const int thread_id = simd_gid * kLanes + simd_lid;
  const int query = params.first_query + tid.y, key = tid.x * kScoreKeys;
  const Visible visible = visible_keys(start, params.rows, params.b, query);
  const int low = visible.low, high = visible.high;
  if (key + kScoreKeys <= low || key >= high) {
    return;
  }
  const int dim = params.rows.rank, heads = params.heads;
  const R rows = rows_of<R>(keys, keys, params.rows, params.b);
  const size_t token = size_t(params.b) * params.rows.queries + query;
  q += token * heads * dim;
  weights += token * heads;

  thread float score[2] = {0, 0};
  for (int head = 0; head < heads; head += kHeads) {
    const int used = min(kHeads, heads - head);
    thread float dot[2 * kHeads];
    for (int i = 0; i < 2 * kHeads; i++) {
      dot[i] = 0;
    }
    for (int first = 0; first < dim; first += kDims) {
      const int depth = min(kDims, dim - first);
      for (int i = thread_id; i < kDims * kScoreKeys; i += kScoreThreads) {
        const int d = i % kDims, row = i / kDims;
        const bool seen = key + row >= low && key + row < high;
        k[d * kKeyPitch + row] =
            d < depth && seen ? rows.value(key + row, first + d) : 0.0f;
      }
      for (int i = thread_id; i < kDims * kHeads; i += kScoreThreads) {
        const int d = i % kDims, h = i / kDims;
        queries[d * kHeads + h] = d < depth && h < used
            ? static_cast<float>(q[(head + h) * dim + first + d])
            : 0.0f;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int d = 0; d < depth; d++) {
        const float a = k[d * kKeyPitch + thread_id];
        const float b = k[d * kKeyPitch + thread_id + kScoreThreads];
        for (int h = 0; h < kHeads; h++) {
          const float query = queries[d * kHeads + h];
          dot[2 * h] = fma(query, a, dot[2 * h]);
          dot[2 * h + 1] = fma(query, b, dot[2 * h + 1]);
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int h = 0; h < kHeads; h++) {
      if (h < used) {
        const float weight =
            glm_fused::product(weights[head + h], params.weight_scale);
        for (int i = 0; i < 2; i++) {
          score[i] = fma(weight, relu(dot[2 * h + i] * params.scale), score[i]);
        }
      }
    }
  }
  for (int i = 0; i < 2; i++) {
    const int at = key + thread_id + i * kScoreThreads;
    if (at >= low && at < high) {
      words[size_t(tid.y) * params.rows.keys + at] = ordered(score[i]);
    }
  }
}

GLM_CONST int kDigitBits = 11;
GLM_CONST int kDigits = 1 << kDigitBits;

// A token's visible words and its threads. Every loop takes a simdgroup's lanes
// together, so that they meet at simdgroup functions.
struct Selection {
  const device uint* words;
  int low;
  int high;
  threadgroup atomic_uint* histogram;  // [kDigits]
  threadgroup uint* found;             // [2]
  int lane;
  int simdgroup;
  int simdgroups;

  // Counts, for each digit, the words with `prefix` above shift + kDigitBits.
  METAL_FUNC void count(int shift, uint prefix, uint mask) const thread {
    const int thread_id = simdgroup * kLanes + lane;
    const int threads = simdgroups * kLanes;
    for (int i = thread_id; i < kDigits; i += threads) {
      atomic_store_explicit(&histogram[i], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = low + simdgroup * kLanes; i < high; i += threads) {
      const bool valid = i + lane < high;
      const uint word = valid ? words[i + lane] : 0u;
      const bool counts = valid && (word & mask) == prefix;
      const uint digit = word >> shift & (kDigits - 1);
      // Equal words, such as a plateau of zeros, add as one.
      const uint first = simd_broadcast(digit, ushort(0));
      const bool same = digit == first;
      const uint alike = simd_sum(uint(counts && same));
      if (lane == 0 && alike > 0) {
        atomic_fetch_add_explicit(
            &histogram[first], alike, memory_order_relaxed);
      }
      if (counts && !same) {
        atomic_fetch_add_explicit(&histogram[digit], 1u, memory_order_relaxed);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Finds the digit at which the count of larger words reaches `wanted`;
  // `found` becomes the digit and how many of its words are wanted.
  METAL_FUNC void find(uint wanted) const thread {
    if (simdgroup == 0) {
      constexpr int share = kDigits / kLanes;
      const int top = kDigits - 1 - lane * share;  // lane 0 has the largest
      uint mine = 0;
      for (int i = 0; i < share; i++) {
        mine += atomic_load_explicit(&histogram[top - i], memory_order_relaxed);
      }
      uint larger = simd_prefix_exclusive_sum(mine);
      if (larger < wanted && larger + mine >= wanted) {
        int digit = top;
        for (;; digit--) {
          const uint here =
              atomic_load_explicit(&histogram[digit], memory_order_relaxed);
          if (larger + here >= wanted) {
            break;
          }
          larger += here;
        }
        found[0] = digit;
        found[1] = wanted - larger;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
};

// Writes chosen [tokens, top_k] of this dispatch: the keys of the largest
// words, ascending, the lowest among equal ones, and -1 after the last where
// fewer are visible. A threadgroup takes a query.
[[kernel]] void index_select(
    const device uint* all_words [[buffer(0)]],
    const device int* start [[buffer(1)]],
    device int* chosen [[buffer(2)]],
    const constant IndexParams& params [[buffer(3)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup atomic_uint histogram[kDigits];
  threadgroup uint found[2];
  threadgroup uint above[kLanes];
  threadgroup uint equal[kLanes];
  const int query = params.first_query + tid.x, top_k = params.top_k;
  const Visible visible = visible_keys(start, params.rows, params.b, query);
  const int low = visible.low, high = visible.high;
  const int thread_id = simd_gid * kLanes + simd_lid;
  const int threads = simdgroups * kLanes;
  const device uint* words = all_words + size_t(tid.x) * params.rows.keys;
  chosen += (size_t(params.b) * params.rows.queries + query) * top_k;
  if (high - low <= top_k) {
    for (int i = thread_id; i < top_k; i += threads) {
      chosen[i] = low + i < high ? low + i : -1;
    }
    return;
  }

  const Selection selection = {
      words,
      low,
      high,
      histogram,
      found,
      int(simd_lid),
      int(simd_gid),
      int(simdgroups)};
  // The digits have 11, 11 and 10 bits. The last reaches one bit into the
  // second, which is the same in all words that count.
  uint prefix = 0, mask = 0, wanted = top_k;
  for (int shift = 21; shift >= -1; shift -= kDigitBits) {
    const int at = max(shift, 0);
    selection.count(at, prefix, mask);
    selection.find(wanted);
    wanted = found[1];
    prefix = (prefix & ~((kDigits - 1u) << at)) | found[0] << at;
    mask |= (kDigits - 1u) << at;
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Each simdgroup takes one stretch of keys and first counts in it.
  const int share =
      ((high - low + threads - 1) / threads) * kLanes;  // per simdgroup
  const int begin = low + int(simd_gid) * share;
  const int end = min(begin + share, high);
  uint larger = 0, ties = 0;
  for (int i = begin + int(simd_lid); i < end; i += kLanes) {
    larger += words[i] > prefix;
    ties += words[i] == prefix;
  }
  larger = simd_sum(larger);
  ties = simd_sum(ties);
  if (simd_lid == 0) {
    above[simd_gid] = larger;
    equal[simd_gid] = ties;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const bool before = simd_lid < simd_gid;
  uint tied = simd_sum(before ? equal[simd_lid] : 0u);
  uint taken = simd_sum(before ? above[simd_lid] : 0u) + min(tied, wanted);
  for (int i = begin; i < end; i += kLanes) {
    const int at = i + int(simd_lid);
    const uint word = at < end ? words[at] : 0u;
    const bool tie = at < end && word == prefix;
    const uint rank = tied + simd_prefix_exclusive_sum(uint(tie));
    const bool keep = at < end && (word > prefix || (tie && rank < wanted));
    const uint to = taken + simd_prefix_exclusive_sum(uint(keep));
    if (keep) {
      chosen[to] = at;
    }
    taken += simd_sum(uint(keep));
    tied += simd_sum(uint(tie));
  }
}
