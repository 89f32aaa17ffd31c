// The experts of one layer for a prompt: pairs of a token and one of its
// choices are grouped by slot, so that a threadgroup reads weights once for all
// pairs of a group, up to 128. Weights are decoded in threadgroup memory and
// multiplied by matrix units, so the order of the sums is the hardware's.
#pragma once

#include "dot_rows.h"
#include "matrix_unit.h"
#include "params.h"
#include "swiglu.h"

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

GLM_CONST int kGroupSimdgroups = 4;
GLM_CONST int kGroupThreads = kGroupSimdgroups * kLanes;

// A threadgroup multiplies up to 128 vectors by 64 rows, 32 columns at a time.
// A simdgroup takes every fourth eight of the vectors, so that few vectors
// occupy all simdgroups.
GLM_CONST int kGroupVectors = 128;
GLM_CONST int kGroupRows = 64;
GLM_CONST int kGroupColumns = 32;
GLM_CONST int kTall = kGroupVectors / kSide / kGroupSimdgroups;
GLM_CONST int kWide = kGroupRows / kSide;
// So many eights of rows are summed at once over the columns of a step. These
// sums are added to those of all columns, which keeps their error small.
GLM_CONST int kWideStep = 2;
GLM_CONST int kSums = kTall * kWide;

// Rows of threadgroup memory begin in unlike banks.
GLM_CONST int kRowPitch = kGroupColumns + 4;
template <typename T>
METAL_FUNC constexpr int vector_pitch() {
  return kGroupColumns + 16 / int(sizeof(T));
}

template <typename T>
struct GroupProduct {
  threadgroup T* vectors;   // [kGroupVectors, vector_pitch]
  threadgroup float* rows;  // [kGroupRows, kRowPitch]
  int count;                // of vectors
  int simdgroup;
  int lane;

  // Gives a lane's vector of an eight, and its place in the group.
  METAL_FUNC int own_vector(int eight) const thread {
    return (simdgroup + eight * kGroupSimdgroups) * kSide + matrix_row(lane);
  }
  METAL_FUNC bool has(int eight) const thread {
    return (simdgroup + eight * kGroupSimdgroups) * kSide < count;
  }

  // Reads columns [column, column + kGroupColumns) of the vectors, vector i
  // from x + offsets[i] on; what lies beyond k is 0. With `aligned`, vectors
  // are fours.
  template <bool aligned>
  METAL_FUNC void load_vectors(
      const device T* x,
      const threadgroup int* offsets,
      int stride,
      int column,
      int k) const thread {
    constexpr int fours = kGroupColumns / 4;
    const int whole = (count + kSide - 1) / kSide * kSide;
    for (int i = simdgroup * kLanes + lane; i < whole * fours;
         i += kGroupThreads) {
      const int vector = i / fours, at = i % fours * 4;
      threadgroup T* to = vectors + vector * vector_pitch<T>() + at;
      const int left = vector < count ? k - column - at : 0;
      const device T* from = x +
          size_t(vector < count ? offsets[vector] : 0) * stride + column + at;
      if (aligned && left > 0) {
        *(threadgroup vec<T, 4>*)to = *(const device vec<T, 4>*)from;
      } else {
        GLM_UNROLL
        for (int j = 0; j < 4; j++) {
          to[j] = j < left ? from[j] : T(0);
        }
      }
    }
  }

  // Decodes the same columns of `most` rows, of which there are `used`, to
  // rows [first, first + most); `w` is at the first row.
  template <typename F, int most>
  METAL_FUNC void load_rows(
      const thread Matrix<F>& w,
      int first,
      int used,
      int column,
      int k) const thread {
    constexpr int cells_of_row = kGroupColumns / F::values;
    for (int i = simdgroup * kLanes + lane; i < most * cells_of_row;
         i += kGroupThreads) {
      const int row = i / cells_of_row, at = i % cells_of_row * F::values;
      const int left = row < used ? k - column - at : 0;
      thread float values[F::values];
      if (left > 0) {
        const Matrix<F> from = w.skip(row, column + at, k);
        thread typename F::Cells cells;
        if (left >= F::values) {
          F::load(from.weight, from.scales, from.biases, column + at, cells);
        } else {
          F::load_safe(
              from.weight, from.scales, from.biases, column + at, left, cells);
        }
        F::decode(cells, values);
      }
      threadgroup float* to = rows + (first + row) * kRowPitch + at;
      GLM_UNROLL
      for (int j = 0; j < F::values; j += 4) {
        *(threadgroup float4*)(to + j) = left > 0
            ? float4(values[j], values[j + 1], values[j + 2], values[j + 3])
            : float4(0.0f);
      }
    }
  }

  // Adds the products of these columns to the sums, [kTall, kWide] matrices.
  METAL_FUNC void multiply(thread float2* sums) const thread {
    constexpr int deep = kGroupColumns / kSide;
    const threadgroup T* a = vectors + matrix_column(lane);
    const threadgroup float* b =
        rows + matrix_column(lane) * kRowPitch + matrix_row(lane);
    GLM_UNROLL
    for (int j = 0; j < kWide; j += kWideStep) {
      thread float2 part[kTall * kWideStep];
      GLM_UNROLL
      for (int i = 0; i < kTall * kWideStep; i++) {
        part[i] = float2(0.0f);
      }
      GLM_UNROLL
      for (int d = 0; d < deep; d++) {
        thread float2 right[kWideStep];
        GLM_UNROLL
        for (int n = 0; n < kWideStep; n++) {
          // A row of the weight is a column of the matrix.
          const threadgroup float* from =
              b + (j + n) * kSide * kRowPitch + d * kSide;
          right[n] = float2(from[0], from[kRowPitch]);
        }
        GLM_UNROLL
        for (int i = 0; i < kTall; i++) {
          if (has(i)) {
            const threadgroup T* from =
                a + own_vector(i) * vector_pitch<T>() + d * kSide;
            const float2 left = float2(
                static_cast<float>(from[0]), static_cast<float>(from[1]));
            GLM_UNROLL
            for (int n = 0; n < kWideStep; n++) {
              multiply_matrices(left, right[n], part[i * kWideStep + n]);
            }
          }
        }
      }
      GLM_UNROLL
      for (int i = 0; i < kTall * kWideStep; i++) {
        sums[i / kWideStep * kWide + j + i % kWideStep] += part[i];
      }
    }
  }
};

// Gives a slot's rows from `row` on.
template <typename F>
METAL_FUNC Matrix<F>
rows_of_slot(Matrix<F> bank, int slot, int row, int n, int k) {
  const Matrix<F> first = bank.at(slot, n, k, 0);
  return first.skip(row, 0, k);
}

// Sets act [pairs in order, intermediate] to silu(gate x) * up x. The grid is
// (blocks of 32 rows, slots).
template <typename T, typename Gate, typename Up, bool aligned>
[[kernel, max_total_threads_per_threadgroup(kGroupThreads)]] void
grouped_gate_up(
    const device T* x [[buffer(0)]],
    const device int* order [[buffer(1)]],
    const device uint8_t* gate_weight [[buffer(2)]],
    const device typename Gate::scale_type* gate_scales [[buffer(3)]],
    const device typename Gate::scale_type* gate_biases [[buffer(4)]],
    const device uint8_t* up_weight [[buffer(5)]],
    const device typename Up::scale_type* up_scales [[buffer(6)]],
    const device typename Up::scale_type* up_biases [[buffer(7)]],
    const device PairGroup* groups [[buffer(8)]],
    device T* act [[buffer(9)]],
    const constant MoeParams& params [[buffer(10)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
  constexpr int half_rows = kGroupRows / 2;
  constexpr int half_wide = kWide / 2;
  threadgroup vec<T, 4> vectors[kGroupVectors * vector_pitch<T>() / 4];
  threadgroup float4 rows[kGroupRows * kRowPitch / 4];
  threadgroup int tokens[kGroupVectors];
  const int k = params.hidden, n = params.intermediate, slot = tid.y;
  const int row = tid.x * half_rows, used = min(half_rows, n - row);
  const PairGroup group = groups[slot];
  const Matrix<Gate> gate = rows_of_slot(
      Matrix<Gate>{gate_weight, gate_scales, gate_biases}, slot, row, n, k);
  const Matrix<Up> up = rows_of_slot(
      Matrix<Up>{up_weight, up_scales, up_biases}, slot, row, n, k);
  for (int first = 0; first < group.count; first += kGroupVectors) {
    const int count = min(kGroupVectors, group.count - first);
    const GroupProduct<T> product = {
        (threadgroup T*)vectors,
        (threadgroup float*)rows,
        count,
        int(simd_gid),
        int(simd_lid)};
    const int thread_id = simd_gid * kLanes + simd_lid;
    if (thread_id < count) {
      tokens[thread_id] = order[group.first + first + thread_id] / params.top_k;
    }
    thread float2 sums[kSums];
    GLM_UNROLL
    for (int i = 0; i < kSums; i++) {
      sums[i] = float2(0.0f);
    }
    for (int column = 0; column < k; column += kGroupColumns) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      product.template load_vectors<aligned>(x, tokens, k, column, k);
      product.template load_rows<Gate, half_rows>(gate, 0, used, column, k);
      product.template load_rows<Up, half_rows>(up, half_rows, used, column, k);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      product.multiply(sums);
    }
    GLM_UNROLL
    for (int i = 0; i < kTall * half_wide * 2; i++) {
      const int eight = i / 2 / half_wide, block = i / 2 % half_wide;
      const int vector = product.own_vector(eight);
      const int at = block * kSide + matrix_column(simd_lid) + i % 2;
      if (vector < count && at < used) {
        const glm_fused::As<T> type;
        const int sum = eight * kWide + block;
        const float gated = glm_fused::round_to(
            Gate::total(sums[sum][i % 2], gate.biases), type);
        const float upped = glm_fused::round_to(
            Up::total(sums[sum + half_wide][i % 2], up.biases), type);
        act[size_t(group.first + first + vector) * n + row + at] =
            static_cast<T>(glm_fused::swiglu(gated, upped, type));
      }
    }
  }
}

// Sets y [pairs, hidden] to down act, and to NaN where the slot is none. The
// grid is (blocks of 64 rows, slots and one more).
template <typename T, typename F, bool aligned>
[[kernel, max_total_threads_per_threadgroup(kGroupThreads)]] void grouped_down(
    const device T* act [[buffer(0)]],
    const device int* order [[buffer(1)]],
    const device uint8_t* weight [[buffer(2)]],
    const device typename F::scale_type* scales [[buffer(3)]],
    const device typename F::scale_type* biases [[buffer(4)]],
    const device PairGroup* groups [[buffer(5)]],
    device T* y [[buffer(6)]],
    const constant MoeParams& params [[buffer(7)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]]) {
  threadgroup vec<T, 4> vectors[kGroupVectors * vector_pitch<T>() / 4];
  threadgroup float4 rows[kGroupRows * kRowPitch / 4];
  threadgroup int places[kGroupVectors];
  const int k = params.intermediate, n = params.hidden, slot = tid.y;
  const int row = tid.x * kGroupRows, used = min(kGroupRows, n - row);
  const PairGroup group = groups[slot];
  const int thread_id = simd_gid * kLanes + simd_lid;
  if (slot == params.bank) {
    for (int i = thread_id; i < group.count * used; i += kGroupThreads) {
      const size_t pair = order[group.first + i / used];
      y[pair * n + row + i % used] = static_cast<T>(NAN);
    }
    return;
  }
  const Matrix<F> w =
      rows_of_slot(Matrix<F>{weight, scales, biases}, slot, row, n, k);
  for (int first = 0; first < group.count; first += kGroupVectors) {
    const int count = min(kGroupVectors, group.count - first);
    const GroupProduct<T> product = {
        (threadgroup T*)vectors,
        (threadgroup float*)rows,
        count,
        int(simd_gid),
        int(simd_lid)};
    if (thread_id < count) {
      places[thread_id] = group.first + first + thread_id;
    }
    thread float2 sums[kSums];
    GLM_UNROLL
    for (int i = 0; i < kSums; i++) {
      sums[i] = float2(0.0f);
    }
    for (int column = 0; column < k; column += kGroupColumns) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      product.template load_vectors<aligned>(act, places, k, column, k);
      product.template load_rows<F, kGroupRows>(w, 0, used, column, k);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      product.multiply(sums);
    }
    GLM_UNROLL
    for (int i = 0; i < kSums * 2; i++) {
      const int vector = product.own_vector(i / 2 / kWide);
      const int at = i / 2 % kWide * kSide + matrix_column(simd_lid) + i % 2;
      if (vector < count && at < used) {
        const size_t pair = order[group.first + first + vector];
        y[pair * n + row + at] =
            static_cast<T>(F::total(sums[i / 2][i % 2], w.biases));
      }
    }
  }
}
