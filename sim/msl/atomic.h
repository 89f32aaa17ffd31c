// Atomic functions; relaxed is Metal's only order.
#pragma once

#include "runtime.h"
#include "vec.h"

// OpenCL predeclares these names.
#define atomic_bool msl_atomic_bool
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_ulong msl_atomic_ulong
#define atomic_float msl_atomic_float

namespace metal {

enum memory_order { memory_order_relaxed };

template <typename T>
struct atomic {
  T msl_value;
};
typedef atomic<bool> atomic_bool;
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;

enum msl_atomic_op : uint {
  msl_atomic_load,
  msl_atomic_store,
  msl_atomic_exchange,
  msl_atomic_add,
  msl_atomic_sub,
  msl_atomic_max,
  msl_atomic_min,
  msl_atomic_and,
  msl_atomic_or,
  msl_atomic_xor,
};
// The numbers are the executor's: 0 bool, 1 int, 2 uint, 3 ulong, 4 float.
template <typename T>
constexpr constant uint msl_atomic_type = __is_same(T, bool) ? 0
    : __is_same(T, int)                                      ? 1
    : __is_same(T, uint)                                     ? 2
    : __is_same(T, ulong)                                    ? 3
                                                             : 4;

template <typename T>
MSL_FUNC ulong msl_to_bits(T value) {
  ulong bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
MSL_FUNC T msl_from_bits(ulong bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
MSL_FUNC T msl_atomic(uint op, ulong address, T value) {
  return msl_from_bits<T>(
      sim_rt_atomic(op, msl_atomic_type<T>, address, msl_to_bits(value)));
}

#define MSL_FETCH(space, name)                                     \
  template <typename T, typename U>                                \
  MSL_FUNC T atomic_fetch_##name##_explicit(                       \
      space atomic<T>* object, U value, memory_order) {            \
    return msl_atomic(msl_atomic_##name, (ulong)object, T(value)); \
  }
#define MSL_ATOMICS(space)                                           \
  template <typename T>                                              \
  MSL_FUNC T atomic_load_explicit(                                   \
      const space atomic<T>* object, memory_order) {                 \
    return msl_atomic(msl_atomic_load, (ulong)object, T(0));         \
  }                                                                  \
  template <typename T, typename U>                                  \
  MSL_FUNC void atomic_store_explicit(                               \
      space atomic<T>* object, U value, memory_order) {              \
    msl_atomic(msl_atomic_store, (ulong)object, T(value));           \
  }                                                                  \
  template <typename T, typename U>                                  \
  MSL_FUNC T atomic_exchange_explicit(                               \
      space atomic<T>* object, U value, memory_order) {              \
    return msl_atomic(msl_atomic_exchange, (ulong)object, T(value)); \
  }                                                                  \
  template <typename T, typename U>                                  \
  MSL_FUNC bool atomic_compare_exchange_weak_explicit(               \
      space atomic<T>* object,                                       \
      thread T* expected,                                            \
      U desired,                                                     \
      memory_order,                                                  \
      memory_order) {                                                \
    ulong found = msl_to_bits(*expected);                            \
    bool done = sim_rt_compare_exchange(                             \
        sizeof(T), (ulong)object, &found, msl_to_bits(T(desired)));  \
    *expected = msl_from_bits<T>(found);                             \
    return done;                                                     \
  }                                                                  \
  MSL_FETCH(space, add)                                              \
  MSL_FETCH(space, sub)                                              \
  MSL_FETCH(space, max)                                              \
  MSL_FETCH(space, min)                                              \
  MSL_FETCH(space, and)                                              \
  MSL_FETCH(space, or)                                               \
  MSL_FETCH(space, xor)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
#undef MSL_ATOMICS
#undef MSL_FETCH

}  // namespace metal
