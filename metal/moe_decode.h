// Two launches compute the experts of one layer for up to 16 tokens: those that
// tokens choose, and those that all share, if there are any.
#pragma once

#include "dot_rows.h"
#include "params.h"
#include "sharing.h"
#include "swiglu.h"

// Packs the Link of each pair p into links[p]: bit 0 says whether the pair
// leads a group, and the bits above it are the number of the pair that follows
// it in its slot.
template <int most>
METAL_FUNC void find_links(
    const device int* slots,
    int pairs,
    threadgroup int* links,
    int thread_id,
    int threads) {
  for (int p = thread_id; p < pairs; p += threads) {
    const Link link = link_of(slots, pairs, p, most);
    links[p] = 2 * link.next + link.leads;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

template <typename T, typename Gate, typename Up, int rows>
struct GateUp {
  const device T* x;
  Matrix<Gate> gate;  // at row 0 of the slot
  Matrix<Up> up;
  device T* act;
  int hidden;
  int intermediate;
  int top_k;
  int lane;

  template <int width>
  METAL_FUNC void run(int first_row, const thread int* members, int count)
      const thread {
    constexpr int step = rows_at_once(rows, width);
    thread int offsets[width];
    GLM_UNROLL
    for (int m = 0; m < width; m++) {
      offsets[m] = members[m] / top_k * hidden;
    }
    const Vectors<T> vectors = {x, offsets};
    thread float result[2 * step * width];
    for (int r = 0; r < rows; r += step) {
      const int row = first_row + r;
      const int used = intermediate - row;
      if (used <= 0) {
        return;
      }
      dot_pair<step, width>(
          gate.skip(row, 0, hidden),
          up.skip(row, 0, hidden),
          hidden,
          used,
          vectors,
          lane,
          result);
      GLM_UNROLL
      for (int i = 0; i < step * width; i++) {
        if (lane == 0 && i / width < used && i % width < count) {
          const glm_fused::As<T> type;
          const float gated = glm_fused::round_to(result[i], type);
          const float upped =
              glm_fused::round_to(result[step * width + i], type);
          act[members[i % width] * intermediate + row + i / width] =
              static_cast<T>(glm_fused::swiglu(gated, upped, type));
        }
      }
    }
  }
};

// Sets act[pair] to silu(gate x) * up x. A threadgroup takes a tile of rows of
// the group of pairs that pair tid.y leads. With `shared`, the last tid.y takes
// the shared experts: it sets shared_act[token].
template <
    typename T,
    typename Gate,
    typename Up,
    int rows,
    int most,
    bool shared = false,
    typename SharedGate = Gate,
    typename SharedUp = Up>
[[kernel]] void moe_gate_up(
    const device T* x [[buffer(0)]],
    const device int* slots [[buffer(1)]],
    const device uint8_t* gate_weight [[buffer(2)]],
    const device typename Gate::scale_type* gate_scales [[buffer(3)]],
    const device typename Gate::scale_type* gate_biases [[buffer(4)]],
    const device uint8_t* up_weight [[buffer(5)]],
    const device typename Up::scale_type* up_scales [[buffer(6)]],
    const device typename Up::scale_type* up_biases [[buffer(7)]],
    device T* act [[buffer(8)]],
    const constant MoeParams& params [[buffer(9)]],
    const device uint8_t* shared_gate [[buffer(10)]],
    const device typename SharedGate::scale_type* shared_gate_scales
    [[buffer(11)]],
    const device typename SharedGate::scale_type* shared_gate_biases
    [[buffer(12)]],
    const device uint8_t* shared_up [[buffer(13)]],
    const device typename SharedUp::scale_type* shared_up_scales [[buffer(14)]],
    const device typename SharedUp::scale_type* shared_up_biases [[buffer(15)]],
    device T* shared_act [[buffer(16)]],
    threadgroup int* links [[threadgroup(0)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  const int pairs = params.tokens * params.top_k;
  const int row = (tid.x * simdgroups + simd_gid) * rows;
  if constexpr (shared) {
    if (int(tid.y) == pairs) {
      const GateUp<T, SharedGate, SharedUp, rows> tile = {
          x,
          Matrix<SharedGate>{
              shared_gate, shared_gate_scales, shared_gate_biases}
              .at(0, params.shared_intermediate, params.hidden, simd_lid),
          Matrix<SharedUp>{shared_up, shared_up_scales, shared_up_biases}.at(
              0, params.shared_intermediate, params.hidden, simd_lid),
          shared_act,
          params.hidden,
          params.shared_intermediate,
          1,
          int(simd_lid)};
      const Group<most> all = all_tokens<most>(params.tokens);
      return tile.template run<most>(row, all.members, all.count);
    }
  }
  const int slot = slots[tid.y];
  if constexpr (most > 1) {
    find_links<most>(
        slots, pairs, links, simd_gid * kLanes + simd_lid, simdgroups * kLanes);
  }
  const Group<most> group = group_from<most>(links, pairs, tid.y);
  if (group.count == 0 || slot < 0 || slot >= params.bank) {
    return;  // moe_down_sum makes such a slot's share NaN
  }
  const GateUp<T, Gate, Up, rows> tile = {
      x,
      Matrix<Gate>{gate_weight, gate_scales, gate_biases}.at(
          slot, params.intermediate, params.hidden, simd_lid),
      Matrix<Up>{up_weight, up_scales, up_biases}.at(
          slot, params.intermediate, params.hidden, simd_lid),
      act,
      params.hidden,
      params.intermediate,
      params.top_k,
      int(simd_lid)};
  const int count = group.count;
  if constexpr (most > 8) {
    if (count > 8) {
      return tile.template run<16>(row, group.members, count);
    }
  }
  if constexpr (most > 4) {
    if (count > 4) {
      return tile.template run<8>(row, group.members, count);
    }
  }
  if constexpr (most > 2) {
    if (count > 2) {
      return tile.template run<4>(row, group.members, count);
    }
  }
  if constexpr (most > 1) {
    if (count > 1) {
      return tile.template run<2>(row, group.members, count);
    }
  }
  tile.template run<1>(row, group.members, count);
}

template <typename T, typename F, int rows>
struct Down {
  const device T* act;
  Matrix<F> down;  // at row 0 of the slot
  const device float* scores;
  bool weighed;              // by the scores
  threadgroup float* terms;  // [pairs, rows]
  int hidden;
  int intermediate;
  int lane;

  template <int width>
  METAL_FUNC void run(int first_row, const thread int* members, int count)
      const thread {
    constexpr int step = rows_at_once(rows, width);
    thread int offsets[width];
    GLM_UNROLL
    for (int m = 0; m < width; m++) {
      offsets[m] = members[m] * intermediate;
    }
    const Vectors<T> vectors = {act, offsets};
    thread float result[step * width];
    for (int r = 0; r < rows; r += step) {
      const int row = first_row + r;
      const int used = hidden - row;
      if (used <= 0) {
        return;
      }
      const Matrix<F> w = down.skip(row, 0, intermediate);
      dot_rows<Vectors<T>, F, 1, step, width>(
          &w, intermediate, used, vectors, lane, result);
      GLM_UNROLL
      for (int i = 0; i < step * width; i++) {
        if (lane == 0 && i % width < count) {
          const int pair = members[i % width];
          const glm_fused::As<T> type;
          const float y = glm_fused::round_to(result[i], type);
          terms[pair * rows + r + i / width] = weighed ? y * scores[pair] : y;
        }
      }
    }
  }
};

// Sets y[token] to the sum over its choices, in order, of score * down act. A
// threadgroup takes a tile of rows of all tokens; its simdgroups share out the
// groups of pairs. The products pass through threadgroup memory, so that no
// compiler contracts them with the sum. With `shared`, the shared experts are
// added to the rounded sum; then it is added to the residual, if there is one.
template <
    typename T,
    typename F,
    int rows,
    int most,
    bool shared = false,
    typename Shared = F>
[[kernel]] void moe_down_sum(
    const device T* act [[buffer(0)]],
    const device int* slots [[buffer(1)]],
    const device uint8_t* weight [[buffer(2)]],
    const device typename F::scale_type* scales [[buffer(3)]],
    const device typename F::scale_type* biases [[buffer(4)]],
    const device float* scores [[buffer(5)]],
    device T* y [[buffer(6)]],
    const constant MoeParams& params [[buffer(7)]],
    const device uint8_t* shared_weight [[buffer(8)]],
    const device typename Shared::scale_type* shared_scales [[buffer(9)]],
    const device typename Shared::scale_type* shared_biases [[buffer(10)]],
    const device T* shared_act [[buffer(11)]],
    const device T* residual [[buffer(12)]],
    threadgroup int* links [[threadgroup(0)]],
    threadgroup float* terms [[threadgroup(1)]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint simd_gid [[simdgroup_index_in_threadgroup]],
    uint simd_lid [[thread_index_in_simdgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
  const int pairs = params.tokens * params.top_k;
  const int row = tid.x * rows;
  const int thread_id = simd_gid * kLanes + simd_lid;
  const int threads = simdgroups * kLanes;
  if constexpr (most > 1) {
    find_links<most>(slots, pairs, links, thread_id, threads);
  }
  for (int pair = simd_gid; pair < pairs; pair += simdgroups) {
    const Group<most> group = group_from<most>(links, pairs, pair);
    const int count = group.count;
    const int slot = slots[pair];
    if (count == 0) {
      continue;
    }
    if (slot < 0 || slot >= params.bank) {
      GLM_UNROLL
      for (int m = 0; m < most; m++) {
        if (int(simd_lid) < rows) {
          terms[group.members[m] * rows + simd_lid] = NAN;
        }
      }
      continue;
    }
    const Down<T, F, rows> tile = {
        act,
        Matrix<F>{weight, scales, biases}.at(
            slot, params.hidden, params.intermediate, simd_lid),
        scores,
        true,
        terms,
        params.hidden,
        params.intermediate,
        int(simd_lid)};
    if constexpr (most > 8) {
      if (count > 8) {
        tile.template run<16>(row, group.members, count);
        continue;
      }
    }
    if constexpr (most > 4) {
      if (count > 4) {
        tile.template run<8>(row, group.members, count);
        continue;
      }
    }
    if constexpr (most > 2) {
      if (count > 2) {
        tile.template run<4>(row, group.members, count);
        continue;
      }
    }
    if constexpr (most > 1) {
      if (count > 1) {
        tile.template run<2>(row, group.members, count);
        continue;
      }
    }
    tile.template run<1>(row, group.members, count);
  }
  if constexpr (shared) {
    if (int(simd_gid) == pairs % int(simdgroups)) {
      const Down<T, Shared, rows> tile = {
          shared_act,
          Matrix<Shared>{shared_weight, shared_scales, shared_biases}.at(
              0, params.hidden, params.shared_intermediate, simd_lid),
          scores,
          false,
          terms + pairs * rows,
          params.hidden,
          params.shared_intermediate,
          int(simd_lid)};
      const Group<most> all = all_tokens<most>(params.tokens);
      tile.template run<most>(row, all.members, all.count);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int used = min(rows, params.hidden - row);
  for (int i = thread_id; i < params.tokens * used; i += threads) {
    const int token = i / used, r = i % used;
    float sum = 0;
    for (int choice = 0; choice < params.top_k; choice++) {
      sum = sum + terms[(token * params.top_k + choice) * rows + r];
    }
    const int at = token * params.hidden + row + r;
    const glm_fused::As<T> type;
    float value = glm_fused::round_to(sum, type);
    if constexpr (shared) {
      value =
          glm_fused::round_to(value + terms[(pairs + token) * rows + r], type);
    }
    y[at] = static_cast<T>(
        params.adds ? static_cast<float>(residual[at]) + value : value);
  }
}
