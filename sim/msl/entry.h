// The generated entry points hand a kernel its arguments by this.
#pragma once

#include "vec.h"

// A GPU thread's place, which the executor fills in (sim/runtime/fiber.h).
struct msl_position {
  uint threadgroup_position[3];
  uint thread_position_in_threadgroup[3];
  uint thread_position_in_grid[3];
  uint threadgroups_per_grid[3];
  uint threads_per_threadgroup[3];
  uint threads_per_grid[3];
  uint thread_index;
  uint simdgroup_index;
  uint lane;
  uint simdgroups;
};

struct msl_pointer {
  ulong address;
  template <typename P>
  operator P*() const {
    return (P*)address;
  }
  template <typename P>
  operator P&() const {
    return *(P*)address;
  }
};

struct msl_extent {
  const thread uint* xyz;
  template <typename T>
  operator T() const {
    if constexpr (metal::msl_is_vector<T>) {
      T v(0);
      for (int i = 0; i < metal::msl_lanes<T>::count; i++) {
        v.data[i] = (typename metal::msl_lanes<T>::element)xyz[i];
      }
      return v;
    } else {
      return (T)xyz[0];
    }
  }
};

// Loops stay loops, which compile about twice as fast and give the same bits.
#define GLM_UNROLL
