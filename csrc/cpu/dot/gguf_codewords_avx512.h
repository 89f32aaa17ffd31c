// The codebook formats of GGUF on AVX-512, half a block at a time: a grid is a
// table in registers. Only gguf_kernels_body.h includes this.
#pragma once

#include "cpu/dot/gguf_lane_words_avx512.h"
#include "cpu/dot/gguf_scales_avx512.h"

namespace {

// Of 32 words the even ones of a, the odd ones of b.
GLM_INLINE U16 alternate_words(U16 a, U16 b) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, a, b);
}
template <int n>
GLM_INLINE U16 shift_words_right(U16 a) {
  return _mm512_srli_epi16(a, n);
}
GLM_INLINE U16 bytes_as_words(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <int rows>
using WordTable = Codebook<rows, uint16_t>;
template <int rows, class Fn>
constexpr WordTable<rows> words_for(Fn word) {
  WordTable<rows> made{};
  for (int row = 0; row < rows; row++) {
    made.of[row] = static_cast<uint16_t>(word(row));
  }
  return made;
}

// Looks 32 words up by the lowest bits of as many indices.
template <int rows>
GLM_INLINE U16 look_up(const uint16_t* table, U16 index) {
  if constexpr (rows == 32) {
    return _mm512_permutexvar_epi16(index, load_words(table));
  } else if constexpr (rows == 64) {
    return _mm512_permutex2var_epi16(
        load_words(table), index, load_words(table + 32));
  } else {
    constexpr int half = rows / 2;
    const auto upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(half));
    return _mm512_mask_blend_epi16(
        upper, look_up<half>(table, index), look_up<half>(table + half, index));
  }
}
template <int rows>
GLM_INLINE U16 look_up(const WordTable<rows>& table, U16 index) {
  return look_up<rows>(table.of, index);
}

// The columns of a lane in words of four nibbles: columns 0 to 3 and 8 to 11,
// and the others.
struct Quads {
  U16 even, odd;

  // Words of eight columns.
  GLM_INLINE void join(U16 (&w)[2]) const {
    w[0] = alternate_words(even, shift_left<16>(odd));
    w[1] = alternate_words(shift_right<16>(even), odd);
  }
};
GLM_INLINE Quads operator|(const Quads& a, const Quads& b) {
  return {bits_or(a.even, b.even), bits_or(a.odd, b.odd)};
}

// A grid of eight codes of two bits a row: the first four lie in the lower
// halves of nibbles, the others in the upper ones.
template <int rows>
constexpr WordTable<rows> paired(const uint16_t (&grid)[rows]) {
  return words_for<rows>([&](int row) {
    uint32_t word = 0;
    for (int i = 0; i < 8; i++) {
      word |= (grid[row] >> 2 * i & 3u) << (i % 4 * 4 + i / 4 * 2);
    }
    return word;
  });
}
constexpr auto kIq1Pairs = paired(::gguf::kIq1Grid);
constexpr auto kIq2XxsPairs = paired(::gguf::kIq2XxsGrid);
constexpr auto kIq2XsPairs = paired(::gguf::kIq2XsGrid);
constexpr auto kIq2SPairs = paired(::gguf::kIq2SGrid);

GLM_INLINE Quads quads_of(U16 pairs) {
  return {
      bits_and(pairs, 0x33333333u),
      bits_and(shift_right<2>(pairs), 0x33333333u)};
}

// The signs of eight columns as the highest bits of nibbles, by the lowest
// eight bits of a word. Tables are indexed by five bits, of which they leave
// those that belong to others out.
GLM_INLINE Quads eight_signs(U16 signs) {
  static constexpr auto four =
      words_for<32>([](int i) { return kSigns.of[i & 15]; });
  return {look_up(four, signs), look_up(four, shift_words_right<4>(signs))};
}
// The same by the lowest seven bits: the eighth makes their number even.
GLM_INLINE Quads seven_signs(U16 signs) {
  static constexpr auto first =
      words_for<32>([](int i) { return kEvenSigns.of[i & 15]; });
  static constexpr auto odd =
      words_for<32>([](int i) { return kEvenSigns.of[i & 15] >> 16; });
  static constexpr auto last =
      words_for<32>([](int i) { return kEvenSigns.of[(i & 7) << 4] >> 16; });
  const U16 high = look_up(last, shift_words_right<4>(signs));
  return {look_up(first, signs), _mm512_xor_si512(look_up(odd, signs), high)};
}
// Seven signs of each of four groups, in the words that two lanes have each.
GLM_INLINE U16 words_of_signs(U16 four) {
  static constexpr Numbers shift = numbers([](int l) { return l % 2 * 14; });
  const U16 two = _mm512_srlv_epi32(four, load_numbers(shift));
  return alternate_words(two, shift_left<9>(two));
}

// LaneCodes: the columns of a lane in two words of nibbles.

template <>
struct LaneCodes<Family::iq2_xxs> {
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[2]) {
    const U16 words = load_words(half + 2);
    const U16 index = _mm512_shuffle_epi8(
        words, control(0x80018000, 0x80038002, 0x80098008, 0x800b800a));
    const U16 signs = _mm512_shuffle_epi32(words, _MM_PERM_DDBB);
    const Quads codes = quads_of(look_up(kIq2XxsPairs, index));
    (codes | seven_signs(words_of_signs(signs))).join(w);
  }
};
template <>
struct LaneCodes<Family::iq2_xs> {
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[2]) {
    const U16 words = load_words(half + 2);
    const Quads codes = quads_of(look_up(kIq2XsPairs, words));
    (codes | seven_signs(shift_words_right<9>(words))).join(w);
  }
};
template <>
struct LaneCodes<Family::iq3_xxs> {
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[2]) {
    const U16 words = load_words(half + 2);
    const U16 signs = each_twice(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + 66)));
    const Quads codes{
        look_up(kIq3XxsRows, words),
        look_up(kIq3XxsRows, shift_words_right<8>(words))};
    (codes | seven_signs(words_of_signs(signs))).join(w);
  }
};
template <>
struct LaneCodes<Family::iq3_s> {
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[2]) {
    constexpr uint32_t upper = 0xff00ff00u;
    const U16 words = load_words(half + 2);
    uint64_t tops;
    memcpy(&tops, half + 66, sizeof(tops));
    const U16 ninth = _mm512_maskz_set1_epi8(tops, 1);
    const U16 even = merged(shift_left<8>(ninth), upper, words, ~upper);
    const U16 odd = merged(ninth, upper, shift_words_right<8>(words), ~0u);
    const Quads codes{look_up(kIq3SRows, even), look_up(kIq3SRows, odd)};
    (codes | eight_signs(bytes_as_words(half + 74))).join(w);
  }
};

// Those of a large grid: which of its rows the lanes' first and second eight
// columns are, and what becomes of the rows' words where they are looked up in
// memory. `load` looks them up in registers: it is for a few rows.

// Which of 16 bytes each word has as its upper one, and by how many bits it is
// shifted then.
struct UpperBytes {
  Controls control;
  WordTable<32> shift;
};
template <class Byte, class Shift>
constexpr UpperBytes upper_bytes(Byte byte, Shift shift) {
  return {
      controls([=](int i) { return i % 2 == 1 ? byte(i / 2) : kNoByte; }),
      words_for<32>(shift)};
}
// Bytes of an index, with what `mask` leaves of those upper ones above them.
GLM_INLINE U16 below_upper(
    const uint8_t* bytes,
    const uint8_t* upper,
    const UpperBytes& picks,
    uint32_t mask) {
  const U16 each = _mm512_srlv_epi16(
      in_parts(upper, picks.control), load_words(picks.shift.of));
  return merged(each, mask, bytes_as_words(bytes), ~0u);
}

template <>
struct LaneCodes<Family::iq2_s> {
  static constexpr const auto& grid = kIq2SRows;
  static GLM_INLINE U16 index(const uint8_t* half) {
    static constexpr UpperBytes picks = upper_bytes(
        [](int g) { return g / 4; }, [](int g) { return g % 4 * 2; });
    return below_upper(half + 2, half + 66, picks, 0x03000300);
  }
  static GLM_INLINE void finish(const uint8_t* half, U16 (&w)[2]) {
    U16 signs[2];
    eight_signs(bytes_as_words(half + 34)).join(signs);
    unroll<2>(GLM_EACH(i) { w[i] = bits_or(w[i], signs[i]); });
  }
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[2]) {
    const Quads codes = quads_of(look_up(kIq2SPairs, index(half)));
    (codes | eight_signs(bytes_as_words(half + 34))).join(w);
  }
};

// What kIq1Rows has at an index: the bit above those of a grid's row says
// whether its values are moved down.
GLM_INLINE void look_iq1_up(U16 index, U16 (&w)[2]) {
  const auto above = _mm512_testn_epi16_mask(index, _mm512_set1_epi16(2048));
  const U16 ones = _mm512_maskz_set1_epi16(above, 0x1111);
  const U16 pairs = look_up(kIq1Pairs, index);
  const Quads nibbles{
      merged(shift_left<2>(pairs), 0xccccccccu, ones, ~0u),
      merged(pairs, 0xccccccccu, ones, ~0u)};
  nibbles.join(w);
}
template <>
struct LaneCodes<Family::iq1_s> {
  static constexpr const auto& grid = kIq1Rows;
  static GLM_INLINE U16 index(const uint8_t* half) {
    static constexpr Controls own =
        controls([](int i) { return i / 8 * 2 + i % 2; });
    static constexpr auto shift =
        words_for<32>([](int g) { return g % 4 * 3; });
    const U16 heads = in_parts(half + 34, own);
    const U16 rows = _mm512_srlv_epi16(heads, load_words(shift.of));
    const U16 index =
        merged(shift_left<8>(rows), 0x07000700, bytes_as_words(half + 2), ~0u);
    return merged(shift_right<4>(heads), 0x08000800, index, ~0u);
  }
  static GLM_INLINE void finish(const uint8_t*, U16 (&)[2]) {}
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[2]) {
    look_iq1_up(index(half), w);
  }
};
template <>
struct LaneCodes<Family::iq1_m> {
  static constexpr const auto& grid = kIq1Rows;
  static GLM_INLINE U16 index(const uint8_t* half) {
    static constexpr UpperBytes picks = upper_bytes(
        [](int g) { return g / 2; }, [](int g) { return g % 2 * 4; });
    return below_upper(half, half + 32, picks, 0x0f000f00);
  }
  static GLM_INLINE void finish(const uint8_t*, U16 (&)[2]) {}
  static GLM_INLINE void load(const uint8_t* half, U16 (&w)[2]) {
    look_iq1_up(index(half), w);
  }
};

}  // namespace
