// The experts of one layer for a prompt: pairs of a token and one of its
// choices are grouped by slot, so that a threadgroup reads weights once for all
// pairs of a group, up to 128, or 64 of fp32. The order of the sums is the
// matrix units'.
#pragma once

#include "group_pairs.h"
#include "group_product.h"
#include "swiglu.h"

// Gives a slot's rows from `row` on.
template <typename F>
METAL_FUNC Matrix<F>
rows_of_slot(Matrix<F> bank, int slot, int row, int n, int k) {
  const Matrix<F> first = bank.at(slot, n, k, 0);
  return first.skip(row, 0, k);
}

// Multiplies all vectors of a group by the rows of a job, which tells which row
// of x is the vector of a place in the order of pairs, decodes rows, and stores
// what belongs to a place and a row.
template <typename T, bool aligned, typename Job>
METAL_FUNC void multiply_group(
    const thread Job& job,
    PairGroup group,
    const device T* x,
    int k,
    threadgroup T* vectors,
    threadgroup float* rows,
    threadgroup int* places,
    int simdgroup,
    int lane) {
  const int thread_id = simdgroup * kLanes + lane;
  typedef GroupTile<T> Tile;
  for (int first = 0; first < group.count; first += Tile::vectors) {
    const int count = min(Tile::vectors, group.count - first);
    const GroupProduct<T> product = {vectors, rows, count, simdgroup, lane};
    if (thread_id < count) {
      places[thread_id] = job.row_of_x(group.first + first + thread_id);
    }
    thread GroupSums<T> sums;
    sums.clear();
    for (int column = 0; column < k; column += kGroupColumns) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      product.template load_vectors<aligned>(x, places, column, k);
      job.load(product, column, k);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      product.multiply(sums);
    }
    GLM_UNROLL
    for (int i = 0; i < Tile::tall * Job::wide * 2; i++) {
      const int eight = i / 2 / Job::wide, block = i / 2 % Job::wide;
      const int vector = product.own_vector(eight);
      const int at = block * kSide + matrix_column(lane) + i % 2;
      if (vector < count && at < job.used) {
        const thread float2* own = sums.sums + eight * kWide + block;
        job.store(group.first + first + vector, at, own, i % 2);
      }
    }
  }
}

// Half of the rows are gate's, half are up's.
template <typename T, typename Gate, typename Up>
struct GateUpJob {
  GLM_CONST int most = kGroupRows / 2;
  GLM_CONST int wide = kWide / 2;
  Matrix<Gate> gate;
  Matrix<Up> up;
  const device int* order;
  device T* act;  // [pairs in order, n], from the first row on
  int top_k;
  int n;
  int used;

  METAL_FUNC int row_of_x(int place) const thread {
    return order[place] / top_k;
  }
  METAL_FUNC void load(const thread GroupProduct<T>& product, int column, int k)
      const thread {
    product.template load_rows<Gate, most>(gate, 0, used, column, k);
    product.template load_rows<Up, most>(up, most, used, column, k);
  }
  METAL_FUNC void store(int place, int row, const thread float2* sums, int i)
      const thread {
    const glm_fused::As<T> type;
    const float gated =
        glm_fused::round_to(Gate::total(sums[0][i], gate.biases), type);
    const float upped =
        glm_fused::round_to(Up::total(sums[wide][i], up.biases), type);
    act[size_t(place) * n + row] =
        static_cast<T>(glm_fused::swiglu(gated, upped, type));
  }
};

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
  typedef GateUpJob<T, Gate, Up> Job;
  typedef GroupTile<T> Tile;
  threadgroup vec<T, 4> vectors[Tile::vectors * Tile::pitch / 4];
  threadgroup float4 rows[kGroupRows * kRowPitch / 4];
  threadgroup int places[Tile::vectors];
  const int k = params.hidden, n = params.intermediate, slot = tid.y;
  const int row = tid.x * Job::most;
  const Job job = {
      rows_of_slot(
          Matrix<Gate>{gate_weight, gate_scales, gate_biases}, slot, row, n, k),
      rows_of_slot(
          Matrix<Up>{up_weight, up_scales, up_biases}, slot, row, n, k),
      order,
      act + row,
      params.top_k,
      n,
      min(Job::most, n - row)};
  multiply_group<T, aligned>(
      job,
      groups[slot],
      x,
      k,
      (threadgroup T*)vectors,
      (threadgroup float*)rows,
      places,
      simd_gid,
      simd_lid);
}

template <typename T, typename F>
struct DownJob {
  GLM_CONST int wide = kWide;
  Matrix<F> w;
  const device int* order;
  device T* y;  // [pairs, n], from the first row on
  int n;
  int used;

  METAL_FUNC int row_of_x(int place) const thread {
    return place;
  }
  METAL_FUNC void load(const thread GroupProduct<T>& product, int column, int k)
      const thread {
    product.template load_rows<F, kGroupRows>(w, 0, used, column, k);
  }
  METAL_FUNC void store(int place, int row, const thread float2* sums, int i)
      const thread {
    y[size_t(order[place]) * n + row] =
        static_cast<T>(F::total(sums[0][i], w.biases));
  }
};

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
  typedef GroupTile<T> Tile;
  threadgroup vec<T, 4> vectors[Tile::vectors * Tile::pitch / 4];
  threadgroup float4 rows[kGroupRows * kRowPitch / 4];
  threadgroup int places[Tile::vectors];
  const int k = params.intermediate, n = params.hidden, slot = tid.y;
  const int row = tid.x * kGroupRows, used = min(kGroupRows, n - row);
  const PairGroup group = groups[slot];
  if (slot == params.bank) {
    for (int i = simd_gid * kLanes + simd_lid; i < group.count * used;
         i += kGroupThreads) {
      const size_t pair = order[group.first + i / used];
      y[pair * n + row + i % used] = static_cast<T>(NAN);
    }
    return;
  }
  const DownJob<T, F> job = {
      rows_of_slot(Matrix<F>{weight, scales, biases}, slot, row, n, k),
      order,
      y + row,
      n,
      used};
  multiply_group<T, aligned>(
      job,
      group,
      act,
      k,
      (threadgroup T*)vectors,
      (threadgroup float*)rows,
      places,
      simd_gid,
      simd_lid);
}
