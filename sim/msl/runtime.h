// Compiled shaders call these functions of the executor
// (sim/runtime/device_abi.cpp).
#pragma once

#include "types.h"

// A simdgroup operation, with the values that its lanes brought, by lane.
struct msl_exchange {
  uint mask;      // lanes that take part
  uint combined;  // set by the first lane to reduce the values in place
  uint unused[2];
  uchar values[32 * 64];
};

extern "C" {
uint sim_rt_lane(void);
thread msl_exchange* sim_rt_exchange(
    uint op,
    const thread void* value,
    uint size,
    ulong file,
    uint line) MSL_CONVERGENT;
void sim_rt_barrier(uint flags, ulong file, uint line) MSL_CONVERGENT;
void sim_rt_simd_barrier(uint flags, ulong file, uint line) MSL_CONVERGENT;
ulong sim_rt_threadgroup(uint id, ulong size) __attribute__((const));
ulong sim_rt_atomic(uint op, uint type, ulong address, ulong value);
bool sim_rt_compare_exchange(
    uint size,
    ulong address,
    thread ulong* expected,
    ulong desired);
}

// These say where a synchronising call stands in the source.
#define MSL_SITE \
  ulong msl_file = (ulong) __builtin_FILE(), uint msl_line = __builtin_LINE()
#define MSL_HERE msl_file, msl_line
