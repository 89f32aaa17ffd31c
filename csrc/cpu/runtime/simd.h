// Sixteen fp32 lanes, half of a simdgroup, on the instruction set that the
// including file selects with GLM_AVX512, GLM_AVX2 or neither (portable).
//
// simd_<isa>.h defines F16 and U16, sixteen floats and sixteen 32-bit words,
// and the same functions over them; on AVX2 some take F8 and U8, half of the
// lanes, too. Some are not explained by their names:
//   half_to_float(a)      the low 16 bits of every word, read as IEEE half
//   shift_right_signed<n>(a)   with copies of the highest bit
//   upper_half<0>(a)      the low 16 bits of every word, as those of a float's
//                         upper half; <1>: the high ones
//   set_where_equal(a, mask, n, bits)   a | bits where a & mask is n, else a
//   nan_where(a, mask, v)  NaN where a & mask is not 0, else v
//   Table16(v)(index)     v[index & 15] (not on AVX2)
//   splat_word(p)         every word is that at p
//   Shuffle(c)(p)         byte i is byte c[i] of the 16 at p, or 0 where c[i]
//                         is 0x80; four bytes make a lane
//   Shuffle(c).first_eight(p)   the same of the eight at p
//   load_pairs(p, …)      lane l owns words 2 l and 2 l + 1
//   load_threes(p)        lane l owns the three bytes at p + 3 * l; the fourth
//                         is any; kThreesOverread bytes past them are read, and
//                         so on
//   load_fives(p, …)      lane l owns the words at p + 5 * l and one byte on
//   load_sixes(p, …)      lane l owns the words at p + 6 * l and two bytes on
//   load_tens(p, …)       lane l owns the words at p + 10 * l, four bytes and
//                         six bytes on
//   load_quads(p, out)    lane l owns the four floats at p + 16 * l
//   split_lanes(a, b, …)  the even and the odd of 32 floats
//   interleave_lanes(a, b)   lanes 0, 1, 4, 5, … of both side by side in a, the
//                         others in b
//   separate_lanes(a, b)  undoes that
//   butterfly_sum(…)      sums a simdgroup by lane distances 16, 8, 4, 2, 1
//   butterfly_sums(…)     sums several simdgroups so
//
// Everything here has internal linkage: the same names are compiled once per
// instruction set, and the linker must not merge them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

// Builds for a debugger or a sanitizer keep the lanes' functions and loops as
// they are written: a compiler takes many minutes for checks that are repeated
// in straight line hundreds of times in one function.
#if defined(GLM_FUSED_NO_FORCED_INLINING)
#define GLM_ALWAYS_INLINE
#define GLM_FLATTEN
#else
#define GLM_FLATTEN __attribute__((flatten))
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
// Not by recursion, whose every step a compiler would inline into the next.
template <class Fn, int... i>
GLM_INLINE void for_each_of(Fn& fn, std::integer_sequence<int, i...>) {
  (fn(Constant<i>()), ...);
}
template <int n, class Fn>
GLM_INLINE void for_each_constant(Fn&& fn) {
  for_each_of(fn, std::make_integer_sequence<int, n>());
}
template <class Fn, int... i>
GLM_INLINE void unroll_of(Fn& fn, std::integer_sequence<int, i...>) {
  (fn(i), ...);
}
// Does the same with an index that is an int, so that arrays of vectors that
// are indexed this way stay in registers and fn is compiled for all at once.
template <int n, class Fn>
GLM_INLINE void unroll(Fn&& fn) {
#if defined(GLM_FUSED_NO_FORCED_INLINING)
  for (int i = 0; i < n; i++) {
    fn(i);
  }
#else
  unroll_of(fn, std::make_integer_sequence<int, n>());
#endif
}
// Does so where code is better if fn is compiled for each index, on which it
// may not count.
template <int n, class Fn>
GLM_INLINE void unroll_each(Fn&& fn) {
#if defined(GLM_FUSED_NO_FORCED_INLINING)
  unroll<n>(fn);
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

namespace {

template <int half, class U>
GLM_INLINE auto upper_half(U a) {
  return as_float(half == 0 ? shift_left<16>(a) : bits_and(a, 0xffff0000u));
}

GLM_INLINE void load(const float* p, F16& v) {
  v = load(p);
}

// Returns a, in a register where there are many: a compiler would read it from
// memory again for each use, and reads would bound the loop.
template <class V>
GLM_INLINE V held(V a) {
#if defined(GLM_AVX512)
  __asm__("" : "+v"(a));
#elif defined(GLM_AVX2)
  __asm__("" : "+x"(a));
#endif
  return a;
}

template <int n>
GLM_INLINE void
butterfly_sums(const F16 (&low)[n], const F16 (&high)[n], float (&sums)[n]) {
  for (int i = 0; i < n; i++) {
    sums[i] = butterfly_sum(low[i], high[i]);
  }
}
// Copies `count` bytes, and pads them with zeros to the size of `to`.
template <size_t size>
GLM_INLINE void
copy_padded(uint8_t (&to)[size], const uint8_t* from, size_t count) {
#if defined(GLM_AVX512)
  for (size_t i = 0; i < size; i += 64) {
    const U16 bytes = load_bytes(from + i, count > i ? count - i : 0);
    const uint64_t all = ~uint64_t{0};
    const uint64_t kept = size - i < 64 ? ~(all << (size - i) % 64) : all;
    _mm512_mask_storeu_epi8(to + i, kept, bytes);
  }
#else
  memset(to, 0, size);
  memcpy(to, from, count);
#endif
}

#if !defined(GLM_AVX512) && !defined(GLM_AVX2)
constexpr size_t kThreesOverread = 1, kFivesOverread = 0, kSixesOverread = 0;
constexpr size_t kTensOverread = 0;
GLM_INLINE U16 load_threes(const uint8_t* p) {
  return load_strided<3>(p);
}
GLM_INLINE void load_fives(const uint8_t* p, U16& first, U16& second) {
  first = load_strided<5>(p);
  second = load_strided<5>(p + 1);
}
GLM_INLINE void load_sixes(const uint8_t* p, U16& first, U16& second) {
  first = load_strided<6>(p);
  second = load_strided<6>(p + 2);
}
GLM_INLINE void
load_tens(const uint8_t* p, U16& first, U16& second, U16& third) {
  first = load_strided<10>(p);
  second = load_strided<10>(p + 4);
  third = load_strided<10>(p + 6);
}
#elif defined(GLM_AVX512)
// Of simdgroups whose halves are added already.
GLM_INLINE void butterfly_sums(const F16 (&both)[16], float (&sums)[16]) {
  // At each step twice as many share a register.
  F16 twos[8], fours[4], eights[2];
  unroll<8>(GLM_EACH(i) {
    const F16 a = both[i], b = both[i + 8];
    twos[i] =
        add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  });
  unroll<4>(GLM_EACH(i) {
    const F16 a = twos[i], b = twos[i + 4];
    fours[i] =
        add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  });
  unroll<2>(GLM_EACH(i) {
    const F16 a = fours[i], b = fours[i + 2];
    eights[i] =
        add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  });
  const F16 all =
      add(_mm512_shuffle_ps(eights[0], eights[1], 0x88),
          _mm512_shuffle_ps(eights[0], eights[1], 0xdd));
  const __m512i places =
      _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  _mm512_storeu_ps(sums, _mm512_permutexvar_ps(places, all));
}
GLM_INLINE void
butterfly_sums(const F16 (&low)[4], const F16 (&high)[4], float (&sums)[4]) {
  F16 s[4];
  unroll<4>(GLM_EACH(i) { s[i] = add(low[i], high[i]); });
  // Two simdgroups share a register, then four.
  const auto halves = [](F16 a, F16 b) {
    return add(
        _mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const F16 first = halves(s[0], s[1]), second = halves(s[2], s[3]);
  const F16 quarters =
      add(_mm512_shuffle_f32x4(first, second, 0x88),
          _mm512_shuffle_f32x4(first, second, 0xdd));
  const F16 pairs = add(quarters, _mm512_permute_ps(quarters, 0x4e));
  const F16 all = add(pairs, _mm512_permute_ps(pairs, 0xb1));
  const __m512i each = _mm512_castsi128_si512(_mm_set_epi32(12, 8, 4, 0));
  _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_permutexvar_ps(each, all)));
}
#elif defined(GLM_AVX2)
GLM_INLINE void
butterfly_sums(const F16 (&low)[4], const F16 (&high)[4], float (&sums)[4]) {
  F8 s[4];
  unroll<4>(GLM_EACH(i) {
    const F16 both = add(low[i], high[i]);
    s[i] = add(both.a, both.b);
  });
  // Two simdgroups share a register, then four.
  const auto halves = [](F8 a, F8 b) {
    return add(
        _mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const F8 first = halves(s[0], s[1]), second = halves(s[2], s[3]);
  const F8 pairs =
      add(_mm256_shuffle_ps(first, second, 0x44),
          _mm256_shuffle_ps(first, second, 0xee));
  const F8 all =
      add(_mm256_shuffle_ps(pairs, pairs, 0x88),
          _mm256_shuffle_ps(pairs, pairs, 0xdd));
  const __m128 even = _mm256_castps256_ps128(all);
  const __m128 odd = _mm256_extractf128_ps(all, 1);
  _mm_storeu_ps(sums, _mm_unpacklo_ps(even, odd));
}
#endif

}  // namespace
