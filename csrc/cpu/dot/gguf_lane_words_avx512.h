// How half a block of GGUF's formats becomes lanes on AVX-512. Only
// gguf_kernels_body.h includes this.
#pragma once

namespace {

GLM_INLINE __m128i load16(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

// Four 128-bit parts.
GLM_INLINE U16 parts(__m128i a, __m128i b, __m128i c, __m128i d) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
// Those `stride` bytes apart.
template <int stride>
GLM_INLINE U16 load_parts(const uint8_t* p) {
  return parts(
      load16(p),
      load16(p + stride),
      load16(p + 2 * stride),
      load16(p + 3 * stride));
}

// A number for each lane: fn(lane).
struct Numbers {
  alignas(64) int32_t of[kHalf];
};
template <class Fn>
constexpr Numbers numbers(Fn fn) {
  Numbers made{};
  for (int lane = 0; lane < kHalf; lane++) {
    made.of[lane] = fn(lane);
  }
  return made;
}
GLM_INLINE U16 load_numbers(const Numbers& n) {
  return _mm512_loadu_si512(n.of);
}

// Which of 16 bytes each byte of a register is, or none.
struct Controls {
  alignas(64) uint8_t of[4 * kHalf];
};
constexpr int kNoByte = 0x80;
template <class Fn>
constexpr Controls controls(Fn fn) {
  Controls made{};
  for (int i = 0; i < 4 * kHalf; i++) {
    made.of[i] = static_cast<uint8_t>(fn(i));
  }
  return made;
}
GLM_INLINE U16 in_parts(const uint8_t* sixteen, const Controls& c) {
  const U16 four = _mm512_broadcast_i32x4(load16(sixteen));
  return _mm512_shuffle_epi8(four, load_words(c.of));
}

// Where the 16 bytes of each lane begin, as a word of two registers, and by how
// many bits its words are rotated.
struct LanePlaces {
  Numbers first;
  Numbers shift;
};

// Word i of every lane: from 128 bytes, or from 64.
GLM_INLINE U16 word_of_lanes(const LanePlaces& at, int i, U16 a, U16 b) {
  const U16 index = add_words(load_numbers(at.first), i);
  const U16 word = _mm512_permutex2var_epi32(a, index, b);
  return _mm512_rorv_epi32(word, load_numbers(at.shift));
}
GLM_INLINE U16 word_of_lanes(const LanePlaces& at, int i, U16 a) {
  const U16 index = add_words(load_numbers(at.first), i);
  const U16 word = _mm512_permutexvar_epi32(index, a);
  return _mm512_rorv_epi32(word, load_numbers(at.shift));
}

// Lanes 2 l and 2 l + 1 have the low and the high nibbles of 16 bytes.
constexpr LanePlaces kSplitNibbles{
    numbers([](int l) { return l / 2 * 4; }),
    numbers([](int l) { return l % 2 * 4; })};
// Lanes l and l + 2 of four have those of 32 bytes.
constexpr LanePlaces kPairedNibbles{
    numbers([](int l) { return l / 4 * 8 + l % 2 * 4; }),
    numbers([](int l) { return l / 2 % 2 * 4; })};
// Lanes l and l + 4 of eight have those of 64 bytes.
constexpr LanePlaces kWideNibbles{
    numbers([](int l) { return l / 8 * 16 + l % 4 * 4; }),
    numbers([](int l) { return l / 4 % 2 * 4; })};
// Eight lanes have 32 bytes of two bits each, wanted from bit `to` on.
template <int to>
constexpr LanePlaces kTwoBits{
    numbers([](int l) { return l / 8 * 8 + l % 2 * 4; }),
    numbers([](int l) { return (l % 8 / 2 * 2 - to) & 31; })};
// Sixteen lanes have 32 bytes of one bit each, wanted as bit `to`.
template <int to>
constexpr LanePlaces kPlaneBits{
    numbers([](int l) { return l % 2 * 4; }),
    numbers([](int l) { return (l / 2 - to) & 31; })};

// Lanes 2 i and 2 i + 1 have number i of eight.
constexpr Numbers kPairs = numbers([](int l) { return l / 2; });
constexpr Numbers kOddHalves = numbers([](int l) { return l % 2 * 16; });
GLM_INLINE F16 each_twice(__m256 v) {
  return _mm512_permutexvar_ps(load_numbers(kPairs), _mm512_castps256_ps512(v));
}
GLM_INLINE U16 each_twice(__m256i v) {
  return _mm512_permutexvar_epi32(
      load_numbers(kPairs), _mm512_castsi256_si512(v));
}

// (a & mask) | (b & other).
GLM_INLINE U16 merged(U16 a, uint32_t mask, U16 b, uint32_t other) {
  const U16 kept = bits_and(b, other);
  const U16 of_a = _mm512_set1_epi32(static_cast<int>(mask));
  return _mm512_ternarylogic_epi32(a, of_a, kept, 0xea);
}

// The first 32 bytes.
GLM_INLINE U16 load32(const uint8_t* p) {
  return _mm512_castsi256_si512(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Values of codes that count from `least` on, in steps of 2^log2_step; of those
// that are signed the highest bit is flipped first.
struct Counts {
  int bits, least;
  int log2_step = 0;
  bool is_signed = false;
};

// LaneCodes: bytes, signed ones where nothing else is said; with `counts` their
// lowest bits are such codes, with `table` the low four are the place of a
// value in it.

// The nibbles of four blocks, of which each ends with 16 bytes of them.
template <int bytes>
GLM_INLINE U16 four_blocks(const uint8_t* block) {
  if constexpr (bytes == 18) {  // words of 16 bits, in two registers
    static constexpr auto places = [] {
      struct {
        alignas(64) uint16_t of[2 * kHalf];
      } made{};
      for (int i = 0; i < 2 * kHalf; i++) {
        const int word = i / 8 * 9 + 1 + i % 8;
        made.of[i] = static_cast<uint16_t>(word < 32 ? word : word + 32 - 4);
      }
      return made;
    }();
    return _mm512_permutex2var_epi16(
        load_words(block), load_words(places.of), load_words(block + 8));
  } else {
    return load_parts<bytes>(block + bytes - 16);
  }
}
template <int bytes>
struct SplitBlocks {
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    const U16 a = four_blocks<bytes>(half);
    const U16 b = four_blocks<bytes>(half + 4 * bytes);
    unroll<4>(GLM_EACH(i) { w[i] = word_of_lanes(kSplitNibbles, i, a, b); });
  }
};

template <>
struct LaneCodes<Family::q4_0> : SplitBlocks<18> {
  static constexpr Table table = table_of([](int i) { return i - 8; });
};
template <>
struct LaneCodes<Family::iq4_nl> : SplitBlocks<18> {
  static constexpr Table table =
      table_of([](int i) { return ::gguf::kIq4Values[i]; });
};
template <>
struct LaneCodes<Family::ggml_mxfp4> : SplitBlocks<17> {
  static constexpr Table table =
      table_of([](int i) { return ::gguf::kMxfp4Values[i]; });
};
template <>
struct LaneCodes<Family::iq4_xs> {
  static constexpr Table table = LaneCodes<Family::iq4_nl>::table;
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    const U16 a = load_words(half + 8), b = load_words(half + 72);
    unroll<4>(GLM_EACH(i) { w[i] = word_of_lanes(kSplitNibbles, i, a, b); });
  }
};
template <>
struct LaneCodes<Family::q4_k> {
  static constexpr Table table = table_of([](int i) { return i; });
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    const U16 a = load_words(half + 16), b = load_words(half + 80);
    unroll<4>(GLM_EACH(i) { w[i] = word_of_lanes(kPairedNibbles, i, a, b); });
  }
};
template <>
struct LaneCodes<Family::q2_k> {
  static constexpr Table table = table_of([](int i) { return i & 3; });
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    const U16 a = load_words(half + 16);
    unroll<4>(GLM_EACH(i) { w[i] = word_of_lanes(kTwoBits<0>, i, a); });
  }
};
template <>
struct LaneCodes<Family::q3_k> {
  static constexpr Table table = table_of([](int i) { return (i & 7) - 4; });
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    const U16 high = load32(half), low = load_words(half + 32);
    unroll<4>(GLM_EACH(i) {
      w[i] = merged(
          word_of_lanes(kTwoBits<0>, i, low),
          0x03030303u,
          word_of_lanes(kPlaneBits<2>, i, high),
          0x04040404u);
    });
  }
};

template <>
struct LaneCodes<Family::q8_0> {
  static constexpr Counts counts{8, -128, 0, true};
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    U16 rows[4];
    unroll<4>(GLM_EACH(i) {
      const uint8_t* p = half + 68 * i + 2;
      const auto* next = reinterpret_cast<const __m256i*>(p + 34);
      rows[i] = _mm512_inserti64x4(load32(p), _mm256_loadu_si256(next), 1);
    });
    quads_of(rows, w);
  }
};
template <>
struct LaneCodes<Family::q5_0> {
  static constexpr Counts counts{5, -16};
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    U16 low[4];
    SplitBlocks<22>::load(half, low);
    uint32_t tops[8];
    unroll<8>(GLM_EACH(i) { memcpy(&tops[i], half + 22 * i + 2, 4); });
    const U16 bits = _mm512_srlv_epi32(
        each_twice(_mm256_loadu_si256(reinterpret_cast<__m256i*>(tops))),
        load_numbers(kOddHalves));
    for_each_constant<4>(GLM_EACH(i) {
      // Four bits, and each of them as the fifth of a byte.
      const U16 four = bits_and(shift_right<4 * i>(bits), 15);
      const U16 spread =
          _mm512_mullo_epi32(four, _mm512_set1_epi32(0x00204081 << 4));
      w[i] = merged(low[i], 0x0f0f0f0fu, spread, 0x10101010u);
    });
  }
};
template <>
struct LaneCodes<Family::q5_k> {
  static constexpr Counts counts{5, 0};
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    const U16 high = load32(half + 16);
    const U16 a = load_words(half + 48), b = load_words(half + 112);
    unroll<4>(GLM_EACH(i) {
      w[i] = merged(
          word_of_lanes(kPairedNibbles, i, a, b),
          0x0f0f0f0fu,
          word_of_lanes(kPlaneBits<4>, i, high),
          0x10101010u);
    });
  }
};
template <>
struct LaneCodes<Family::q6_k> {
  static constexpr Counts counts{6, -32};
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[4]) {
    const U16 a = load_words(half), b = load_words(half + 64);
    const U16 high = load_words(half + 128);
    unroll<4>(GLM_EACH(i) {
      w[i] = merged(
          word_of_lanes(kWideNibbles, i, a, b),
          0x0f0f0f0fu,
          word_of_lanes(kTwoBits<4>, i, high),
          0x30303030u);
    });
  }
};

}  // namespace
