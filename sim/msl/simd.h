// Barriers, simdgroup and quadgroup functions.
#pragma once

#include "math.h"
#include "runtime.h"

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}

MSL_CONVERGENT MSL_FUNC void threadgroup_barrier(mem_flags flags, MSL_SITE) {
  sim_rt_barrier((uint)flags, MSL_HERE);
}
MSL_CONVERGENT MSL_FUNC void simdgroup_barrier(mem_flags flags, MSL_SITE) {
  sim_rt_simd_barrier((uint)flags, MSL_HERE);
}

// The hardware moves 32-bit elements at most, as Metal's functions do.
template <typename T>
constexpr constant bool msl_exchangeable =
    msl_is_scalar<typename msl_lanes<T>::element> &&
    sizeof(typename msl_lanes<T>::element) <= 4;

enum msl_op : uint {
  msl_op_sum = 1,
  msl_op_product,
  msl_op_max,
  msl_op_min,
  msl_op_and,
  msl_op_or,
  msl_op_xor,
  msl_op_scan,
  msl_op_shuffle,
  msl_op_fill,
  msl_op_vote,
  msl_op_matrix,
  msl_op_quad = 32,
};

template <typename T>
MSL_FUNC thread T* msl_values(thread msl_exchange* x) {
  return (thread T*)x->values;
}
template <typename T>
MSL_FUNC T msl_poison() {
  T value;
  __builtin_memset(&value, 0xff, sizeof(T));
  return value;
}
template <typename T>
MSL_CONVERGENT MSL_FUNC thread msl_exchange*
msl_share(uint op, T value, ulong msl_file, uint msl_line) {
  static_assert(sizeof(T) <= 64, "too large for a simdgroup function");
  return sim_rt_exchange(op, &value, sizeof(T), MSL_HERE);
}
// Returns the value of lane `from`; on hardware that of a lane that takes no
// part is undefined.
template <typename T>
MSL_FUNC T msl_value_of(thread msl_exchange* x, uint from) {
  if (from < 32 && (x->mask >> from & 1)) {
    return msl_values<T>(x)[from];
  }
  return msl_poison<T>();
}

#define MSL_OPERATION(name, expression)                \
  struct msl_##name {                                  \
    static constexpr constant uint op = msl_op_##name; \
    template <typename T>                              \
    MSL_FUNC static T apply(T a, T b) {                \
      return expression;                               \
    }                                                  \
  };
MSL_OPERATION(sum, a + b)
MSL_OPERATION(product, a* b)
MSL_OPERATION(max, metal::max(a, b))
MSL_OPERATION(min, metal::min(a, b))
MSL_OPERATION(and, a& b)
MSL_OPERATION(or, a | b)
MSL_OPERATION(xor, a ^ b)
template <>
MSL_FUNC float msl_xor::apply(float a, float b) {
  return as_type<float>(as_type<uint>(a) ^ as_type<uint>(b));
}
#undef MSL_OPERATION

// Combines lanes at distance width/2, …, 2, 1, which is the order of a
// butterfly of simd_shuffle_xor. The first lane that gets here does it once.
template <typename F, uint width, typename T>
__attribute__((noinline)) void msl_combine(thread msl_exchange* x) {
  thread T* v = msl_values<T>(x);
  uint mask = x->mask;
  x->combined = 1;
  for (uint base = 0; base < 32; base += width) {
    for (uint d = width / 2; d > 0; d /= 2) {
      for (uint i = base; i < base + d; i++) {
        if (mask >> (i + d) & 1) {
          if (mask >> i & 1) {
            v[i] = F::apply(v[i], v[i + d]);
          } else {
            v[i] = v[i + d];
          }
          mask |= 1u << i;
        }
      }
    }
  }
}
template <typename F, uint width, typename T>
MSL_FUNC T msl_reduce(T value, ulong msl_file, uint msl_line) {
  uint op = F::op + (width == 32 ? 0 : msl_op_quad);
  thread msl_exchange* x = msl_share(op, value, MSL_HERE);
  if (!x->combined) {
    msl_combine<F, width, T>(x);
  }
  return msl_values<T>(x)[sim_rt_lane() & ~(width - 1) & 31];
}
template <typename F, uint width, bool inclusive, typename T>
MSL_FUNC T msl_scan(T value, T identity, ulong msl_file, uint msl_line) {
  thread msl_exchange* x = msl_share(msl_op_scan, value, MSL_HERE);
  uint lane = sim_rt_lane();
  T r = identity;
  for (uint i = lane & ~(width - 1); i < lane + inclusive; i++) {
    if (x->mask >> i & 1) {
      r = F::apply(r, msl_values<T>(x)[i]);
    }
  }
  return r;
}
template <uint width, typename T>
MSL_FUNC T msl_shuffle_to(T value, uint from, ulong msl_file, uint msl_line) {
  thread msl_exchange* x = msl_share(msl_op_shuffle, value, MSL_HERE);
  uint base = sim_rt_lane() & ~(width - 1);
  return from < width ? msl_value_of<T>(x, base + from) : msl_poison<T>();
}

#define MSL_EXCHANGE \
  template <typename T, enable_if_t<msl_exchangeable<T>, int> = 0>

#define MSL_GROUP_FUNCTIONS(group, width)                                      \
  MSL_EXCHANGE MSL_FUNC T group##_sum(T v, MSL_SITE) {                         \
    return msl_reduce<msl_sum, width>(v, MSL_HERE);                            \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_product(T v, MSL_SITE) {                     \
    return msl_reduce<msl_product, width>(v, MSL_HERE);                        \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_max(T v, MSL_SITE) {                         \
    return msl_reduce<msl_max, width>(v, MSL_HERE);                            \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_min(T v, MSL_SITE) {                         \
    return msl_reduce<msl_min, width>(v, MSL_HERE);                            \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_and(T v, MSL_SITE) {                         \
    return msl_reduce<msl_and, width>(v, MSL_HERE);                            \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_or(T v, MSL_SITE) {                          \
    return msl_reduce<msl_or, width>(v, MSL_HERE);                             \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_xor(T v, MSL_SITE) {                         \
    return msl_reduce<msl_xor, width>(v, MSL_HERE);                            \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_prefix_inclusive_sum(T v, MSL_SITE) {        \
    return msl_scan<msl_sum, width, true>(v, T(0), MSL_HERE);                  \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_prefix_exclusive_sum(T v, MSL_SITE) {        \
    return msl_scan<msl_sum, width, false>(v, T(0), MSL_HERE);                 \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_prefix_inclusive_product(T v, MSL_SITE) {    \
    return msl_scan<msl_product, width, true>(v, T(1), MSL_HERE);              \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_prefix_exclusive_product(T v, MSL_SITE) {    \
    return msl_scan<msl_product, width, false>(v, T(1), MSL_HERE);             \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_shuffle(T v, ushort lane, MSL_SITE) {        \
    return msl_shuffle_to<width>(v, lane, MSL_HERE);                           \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_broadcast(T v, ushort lane, MSL_SITE) {      \
    return msl_shuffle_to<width>(v, lane, MSL_HERE);                           \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_shuffle_xor(T v, ushort mask, MSL_SITE) {    \
    return msl_shuffle_to<width>(                                              \
        v, (sim_rt_lane() & (width - 1)) ^ mask, MSL_HERE);                    \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_shuffle_up(T v, ushort d, MSL_SITE) {        \
    return msl_shuffle_to<width>(                                              \
        v, (sim_rt_lane() & (width - 1)) - d, MSL_HERE);                       \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_shuffle_down(T v, ushort d, MSL_SITE) {      \
    return msl_shuffle_to<width>(                                              \
        v, (sim_rt_lane() & (width - 1)) + d, MSL_HERE);                       \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_shuffle_rotate_up(T v, ushort d, MSL_SITE) { \
    return msl_shuffle_to<width>(                                              \
        v, (sim_rt_lane() - d) & (width - 1), MSL_HERE);                       \
  }                                                                            \
  MSL_EXCHANGE MSL_FUNC T group##_shuffle_rotate_down(                         \
      T v, ushort d, MSL_SITE) {                                               \
    return msl_shuffle_to<width>(                                              \
        v, (sim_rt_lane() + d) & (width - 1), MSL_HERE);                       \
  }                                                                            \
  MSL_FUNC bool group##_any(bool v, MSL_SITE) {                                \
    return msl_reduce<msl_or, width>((uint)v, MSL_HERE);                       \
  }                                                                            \
  MSL_FUNC bool group##_all(bool v, MSL_SITE) {                                \
    return msl_reduce<msl_and, width>((uint)v, MSL_HERE);                      \
  }
MSL_GROUP_FUNCTIONS(simd, 32)
MSL_GROUP_FUNCTIONS(quad, 4)
#undef MSL_GROUP_FUNCTIONS

struct simd_vote {
  typedef ulong vote_t;
  ulong bits;
  explicit constexpr simd_vote(ulong v = 0) : bits(v) {}
  explicit constexpr operator ulong() const {
    return bits;
  }
  bool any() const {
    return bits != 0;
  }
  bool all() const {
    return bits == 0xffffffffu;
  }
};
MSL_FUNC simd_vote simd_ballot(bool v, MSL_SITE) {
  thread msl_exchange* x = msl_share(msl_op_vote, (uint)v, MSL_HERE);
  ulong bits = 0;
  for (uint i = 0; i < 32; i++) {
    bits |= x->mask >> i & 1 ? (ulong)msl_values<uint>(x)[i] << i : 0;
  }
  return simd_vote(bits);
}
MSL_FUNC simd_vote simd_active_threads_mask(MSL_SITE) {
  return simd_vote(msl_share(msl_op_vote, 0u, MSL_HERE)->mask);
}
MSL_FUNC bool simd_is_first(MSL_SITE) {
  uint mask = msl_share(msl_op_vote, 0u, MSL_HERE)->mask;
  return sim_rt_lane() == (uint)__builtin_ctz(mask);
}
MSL_EXCHANGE MSL_FUNC T simd_broadcast_first(T v, MSL_SITE) {
  thread msl_exchange* x = msl_share(msl_op_shuffle, v, MSL_HERE);
  return msl_value_of<T>(x, __builtin_ctz(x->mask));
}

template <typename T>
struct msl_with_fill {
  T value, fill;
};
MSL_EXCHANGE MSL_FUNC T
simd_shuffle_and_fill_up(T v, T fill, ushort d, ushort modulo = 32, MSL_SITE) {
  msl_with_fill<T> mine = {v, fill};
  thread msl_exchange* x = msl_share(msl_op_fill, mine, MSL_HERE);
  uint base = sim_rt_lane() & ~(modulo - 1u), i = sim_rt_lane() - base;
  return i >= d ? msl_value_of<msl_with_fill<T>>(x, base + i - d).value
                : msl_value_of<msl_with_fill<T>>(x, base + modulo - d + i).fill;
}
MSL_EXCHANGE MSL_FUNC T simd_shuffle_and_fill_down(
    T v,
    T fill,
    ushort d,
    ushort modulo = 32,
    MSL_SITE) {
  msl_with_fill<T> mine = {v, fill};
  thread msl_exchange* x = msl_share(msl_op_fill, mine, MSL_HERE);
  uint base = sim_rt_lane() & ~(modulo - 1u), i = sim_rt_lane() - base + d;
  return i < modulo ? msl_value_of<msl_with_fill<T>>(x, base + i).value
                    : msl_value_of<msl_with_fill<T>>(x, base + i - modulo).fill;
}

}  // namespace metal

// MLX's bf16_math.h builds its bfloat overloads on these names.
#define __metal_simd_broadcast metal::simd_broadcast
#define __metal_simd_shuffle metal::simd_shuffle
#define __metal_simd_shuffle_and_fill_down metal::simd_shuffle_and_fill_down
#define __metal_simd_shuffle_and_fill_up metal::simd_shuffle_and_fill_up
#define __metal_simd_shuffle_down metal::simd_shuffle_down
#define __metal_simd_shuffle_up metal::simd_shuffle_up
#define __metal_simd_shuffle_rotate_down metal::simd_shuffle_rotate_down
#define __metal_simd_shuffle_rotate_up metal::simd_shuffle_rotate_up
#define __metal_simd_shuffle_xor metal::simd_shuffle_xor
#define __metal_simd_max metal::simd_max
#define __metal_simd_min metal::simd_min
#define __metal_simd_sum metal::simd_sum
#define __metal_simd_product metal::simd_product
#define __metal_simd_xor metal::simd_xor
#define __metal_simd_prefix_exclusive_product \
  metal::simd_prefix_exclusive_product
#define __metal_simd_prefix_exclusive_sum metal::simd_prefix_exclusive_sum
#define __metal_simd_prefix_inclusive_product \
  metal::simd_prefix_inclusive_product
#define __metal_simd_prefix_inclusive_sum metal::simd_prefix_inclusive_sum
MSL_FUNC ushort __metal_get_simdgroup_size(ushort) {
  return 32;
}
