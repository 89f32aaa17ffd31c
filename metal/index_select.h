// The lightning indexer's exact choice of the largest words.
#pragma once

#include "cached_rows.h"
#include "index_digits.h"

// The words that are chosen: those above `word`, and the first `ties` equal it.
struct Threshold {
  uint word;
  uint ties;
};

// Words [low, high), one for every key or kept one, and the threads that select
// among them. Every loop takes a simdgroup's lanes together, so that they meet
// at simdgroup functions.
struct Selection {
  const device uint* words;  // begins at a multiple of 16 bytes
  int low;
  int high;
  threadgroup atomic_uint* histogram;  // [kDigits]
  threadgroup uint* found;             // [2]
  int lane;
  int simdgroup;
  int simdgroups;

  // Gives words at, at + 1, at + 2 and at + 3, of which `at` is a multiple of
  // four; 0 for others than [low, high). As the least word, at either end, 0
  // is never chosen for one of these.
  METAL_FUNC uint4 four(int at) const thread {
    uint4 read = uint4(0);
    if (at < high) {
      read = *(const device uint4*)(words + at);
      GLM_UNROLL
      for (int j = 0; j < 4; j++) {
        read[j] = at + j >= low && at + j < high ? read[j] : 0u;
      }
    }
    return read;
  }

  METAL_FUNC void clear() const thread {
    const int threads = simdgroups * kLanes;
    for (int i = simdgroup * kLanes + lane; i < kDigits; i += threads) {
      atomic_store_explicit(&histogram[i], 0u, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  METAL_FUNC void add(uint digit, uint count) const thread {
    atomic_fetch_add_explicit(&histogram[digit], count, memory_order_relaxed);
  }

  // Counts, for each first digit, the words that lists [begin, end) name.
  METAL_FUNC void count_listed(const device uint* lists, int begin, int end)
      const thread {
    clear();
    for (int i = begin + simdgroup; i < end; i += simdgroups) {
      const device uint* list = lists + i * kListWords;
      const int count = list[0];
      for (int entry = lane; entry < count; entry += kLanes) {
        const uint listed = list[1 + entry];
        add(listed & (kDigits - 1), listed >> kDigitBits);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Counts, for each digit, the words with `prefix` under `mask`.
  METAL_FUNC void count(int shift, uint prefix, uint mask) const thread {
    clear();
    const int step = simdgroups * 4 * kLanes;
    const int begin = low / 4 * 4 + simdgroup * 4 * kLanes;
    for (int i = begin; i < high; i += step) {
      const uint4 read = four(i + 4 * lane);
      const bool any = (read[0] & mask) == prefix ||
          (read[1] & mask) == prefix || (read[2] & mask) == prefix ||
          (read[3] & mask) == prefix;
      if (!simd_any(any)) {
        continue;
      }
      GLM_UNROLL
      for (int j = 0; j < 4; j++) {
        const bool counts = (read[j] & mask) == prefix;
        const uint digit = read[j] >> shift & (kDigits - 1);
        // Equal words, such as a plateau of zeros, add as one.
        const uint first = simd_broadcast(digit, ushort(0));
        const bool same = digit == first;
        const uint alike = simd_sum(uint(counts && same));
        if (lane == 0 && alike > 0) {
          add(first, alike);
        }
        if (counts && !same) {
          add(digit, 1);
        }
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

  // Finds what the top_k largest words are. Lists [begin, end) name the first
  // digits, if there are any.
  METAL_FUNC Threshold threshold(
      int top_k,
      const device uint* lists,
      int begin,
      int end) const thread {
    // The digits have 11, 11 and 10 bits. The last reaches one bit into the
    // second, which is the same in all words that count.
    uint prefix = 0, mask = 0, wanted = top_k;
    for (int shift = kFirstShift; shift >= -1; shift -= kDigitBits) {
      const int at = max(shift, 0);
      if (begin < end && shift == kFirstShift) {
        count_listed(lists, begin, end);
      } else {
        count(at, prefix, mask);
      }
      find(wanted);
      wanted = found[1];
      prefix = (prefix & ~((kDigits - 1u) << at)) | found[0] << at;
      mask |= (kDigits - 1u) << at;
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    return Threshold{prefix, wanted};
  }
};

// Selects the top_k largest words, the lowest among equal ones, and keeps their
// keys, ascending.
//
// With `all`, words [queries of this dispatch, columns] are those of all keys,
// and `source` has the lists of their first digits; else they are words that
// other threadgroups kept, of the keys in `source`. A threadgroup takes
// `stretch` words of a query, so that the grid is (queries, stretches); with
// `last` it takes them all, and `kept` is the op's result, [tokens, top_k],
// with -1 after the last where fewer are visible. Else it is [queries,
// kept_columns], top_k of each threadgroup, with words to match, which are 0
// where there is no key.
template <bool all, bool last>
[[kernel]] void index_select(
    const device uint* words [[buffer(0)]],
    const device int* start [[buffer(1)]],
    device int* kept [[buffer(2)]],
    const constant SelectParams& params [[buffer(3)]],
    const device uint* source [[buffer(4)]],
    device uint* kept_words [[buffer(5)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  threadgroup atomic_uint histogram[kDigits];
  threadgroup uint found[2];
  threadgroup uint above[kLanes];
  threadgroup uint equal[kLanes];
  const int query = params.index.first_query + tid.x;
  const int top_k = params.index.top_k;
  const Visible visible =
      visible_keys(start, params.index.rows, params.index.b, query);
  const int thread_id = simd_gid * kLanes + simd_lid;
  const int threads = simdgroups * kLanes;
  if (last) {
    kept +=
        (size_t(params.index.b) * params.index.rows.queries + query) * top_k;
  } else {
    const size_t at = size_t(tid.x) * params.kept_columns + tid.y * top_k;
    kept += at;
    kept_words += at;
  }
  if (visible.high - visible.low <= top_k) {
    // All keys are chosen, whatever has been kept of them.
    const int written = last ? top_k : 0;
    for (int i = thread_id; i < written; i += threads) {
      const int key = visible.low + i;
      kept[i] = key < visible.high ? key : -1;
    }
    return;
  }
  words += size_t(tid.x) * params.columns;
  source +=
      all ? first_list(tid.x, params.columns) : size_t(tid.x) * params.columns;
  const int begin = tid.y * params.stretch;
  const int end = min(begin + params.stretch, params.count);
  const int low = all ? max(begin, visible.low) : begin;
  const int high = all ? min(end, visible.high) : end;
  if (!last && high - low <= top_k) {
    for (int i = thread_id; i < top_k; i += threads) {
      const int at = low + i;
      const bool is_word = at < high;
      kept[i] = is_word ? (all ? at : int(source[at])) : -1;
      kept_words[i] = is_word ? words[at] : 0u;
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
  const int lists = all ? (high + kScoreKeys - 1) / kScoreKeys * kLists : 0;
  const Threshold least =
      selection.threshold(top_k, source, low / kScoreKeys * kLists, lists);

  // Each simdgroup takes one stretch of words and first counts in it.
  const int first = low / 4 * 4;
  const int step = 4 * kLanes;
  const int share = (high - first + 4 * threads - 1) / (4 * threads) * step;
  const int from = first + int(simd_gid) * share;
  const int to = min(from + share, high);
  uint larger = 0, ties = 0;
  for (int i = from; i < to; i += step) {
    const uint4 read = selection.four(i + 4 * int(simd_lid));
    GLM_UNROLL
    for (int j = 0; j < 4; j++) {
      larger += read[j] > least.word;
      ties += read[j] == least.word;
    }
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
  uint taken = simd_sum(before ? above[simd_lid] : 0u) + min(tied, least.ties);
  for (int i = from; i < to; i += step) {
    const int at = i + 4 * int(simd_lid);
    const uint4 read = selection.four(at);
    ties = 0;
    GLM_UNROLL
    for (int j = 0; j < 4; j++) {
      ties += read[j] == least.word;
    }
    uint rank = tied + simd_prefix_exclusive_sum(ties);
    thread bool keep[4];
    uint count = 0;
    GLM_UNROLL
    for (int j = 0; j < 4; j++) {
      const bool tie = read[j] == least.word;
      keep[j] = read[j] > least.word || (tie && rank < least.ties);
      rank += tie;
      count += keep[j];
    }
    uint place = taken + simd_prefix_exclusive_sum(count);
    GLM_UNROLL
    for (int j = 0; j < 4; j++) {
      if (keep[j]) {
        kept[place] = all ? at + j : int(source[at + j]);
        if (!last) {
          kept_words[place] = read[j];
        }
        place++;
      }
    }
    taken += simd_sum(count);
    tied += simd_sum(ties);
  }
}
