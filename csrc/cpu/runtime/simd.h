// Sixteen fp32 lanes, half of a simdgroup, on the instruction set that the
// including file selects with GLM_AVX512, GLM_AVX2 or neither (portable).
//
// simd_<isa>.h defines F16 and U16, sixteen floats and sixteen 32-bit words,
// and the same functions over them. Some are not explained by their names:
//   half_to_float(a)      the low 16 bits of every word, read as IEEE half
//   Table16(v)(index)     v[index & 15]
//   Shuffle(c)(p)         byte i is byte c[i] of the 16 at p, or 0 where c[i]
//                         is 0x80; four bytes make a lane
//   load_pairs(p, …)      lane l owns words 2 l and 2 l + 1
//   load_strided<s>(p)    lane l owns the unaligned word at p + s * l
//   load_quads(p, out)    lane l owns the four floats at p + 16 * l
//   butterfly_sum(…)      sums a simdgroup by lane distances 16, 8, 4, 2, 1
//
// Everything here has internal linkage: the same names are compiled once per
// instruction set, and the linker must not merge them.
#pragma once

#include <cstdint>

// Builds for a debugger or a sanitizer keep the lanes' functions and loops as
// they are written: a compiler takes many minutes for checks that are repeated
// in straight line hundreds of times in one function.
#if defined(GLM_FUSED_NO_FORCED_INLINING)
#define GLM_ALWAYS_INLINE
#else
#define GLM_ALWAYS_INLINE __attribute__((always_inline))
#endif
#define GLM_INLINE inline GLM_ALWAYS_INLINE

namespace {

constexpr int kHalf = 16;  // lanes in one vector; a simdgroup is two of them

template <int n>
struct Constant {
  constexpr operator int() const {
    return n;
  }
};

// Calls fn(0), fn(1), … fn(n - 1) in straight line; each index is a constant.
template <int n, class Fn>
GLM_INLINE void for_each_constant(Fn&& fn) {
  if constexpr (n > 0) {
    for_each_constant<n - 1>(fn);
    fn(Constant<n - 1>());
  }
}
// Does the same, so that arrays of vectors that are indexed this way stay in
// registers; fn may not count on the index being a constant.
template <int n, class Fn>
GLM_INLINE void unroll(Fn&& fn) {
#if defined(GLM_FUSED_NO_FORCED_INLINING)
  for (int i = 0; i < n; i++) {
    fn(i);
  }
#else
  for_each_constant<n>(fn);
#endif
}
#define GLM_EACH(i) [&](auto i) GLM_ALWAYS_INLINE

}  // namespace

#if defined(GLM_AVX512)
#include "cpu/runtime/simd_avx512.h"
#elif defined(GLM_AVX2)
#include "cpu/runtime/simd_avx2.h"
#else
#include "cpu/runtime/simd_portable.h"
#endif
