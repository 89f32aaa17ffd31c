// The codebook formats of GGUF, half a block at a time: eight columns become a
// word of nibbles, each the place of a value in a table of 16. Only
// gguf_kernels_body.h includes this.
#pragma once

namespace {

#if defined(GLM_AVX2)
// What the other sets have: v[index & 15].
struct Table16 {
  __m256 low, high;
  GLM_INLINE explicit Table16(const float* v)
      : low(_mm256_loadu_ps(v)), high(_mm256_loadu_ps(v + 8)) {}
  GLM_INLINE __m256 lookup(__m256i i) const {
    // Bit 3 of the index, moved to the sign, picks the upper half.
    const __m256 pick = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(low, i),
        _mm256_permutevar8x32_ps(high, i),
        pick);
  }
  GLM_INLINE F16 operator()(U16 index) const {
    return {lookup(index.a), lookup(index.b)};
  }
};
#endif

// The values that nibbles stand for.
struct Table {
  float of[16];
};
template <class Value>
constexpr Table table_of(Value value) {
  Table made{};
  for (int i = 0; i < 16; i++) {
    made.of[i] = static_cast<float>(value(i));
  }
  return made;
}

template <int rows, class Word = uint32_t>
struct Codebook {
  alignas(64) Word of[rows];
};

// Rows of `columns` codes of `bits` bits, a nibble for each.
template <class Word, int columns, int bits, int rows>
constexpr Codebook<rows, Word> nibbles_of(const uint16_t (&grid)[rows]) {
  Codebook<rows, Word> made{};
  for (int row = 0; row < rows; row++) {
    for (int i = 0; i < columns; i++) {
      const Word code = grid[row] >> bits * i & ((1 << bits) - 1);
      made.of[row] = static_cast<Word>(made.of[row] | code << 4 * i);
    }
  }
  return made;
}

constexpr auto kIq2XxsRows = nibbles_of<uint32_t, 8, 2>(::gguf::kIq2XxsGrid);
constexpr auto kIq2XsRows = nibbles_of<uint32_t, 8, 2>(::gguf::kIq2XsGrid);
constexpr auto kIq2SRows = nibbles_of<uint32_t, 8, 2>(::gguf::kIq2SGrid);
constexpr auto kIq3XxsRows = nibbles_of<uint16_t, 4, 3>(::gguf::kIq3XxsGrid);
constexpr auto kIq3SRows = nibbles_of<uint16_t, 4, 3>(::gguf::kIq3SGrid);

// Twice the rows, of nibbles 4 c + 1 for code c; the second half has the values
// that are moved down by one step of two.
constexpr Codebook<4096> kIq1Rows = [] {
  constexpr auto rows = nibbles_of<uint32_t, 8, 2>(::gguf::kIq1Grid);
  Codebook<4096> made{};
  for (int row = 0; row < 2048; row++) {
    made.of[row] = rows.of[row] << 2 | 0x11111111u;
    made.of[row + 2048] = rows.of[row] << 2;
  }
  return made;
}();

// Eight signs as the highest bits of nibbles.
constexpr Codebook<256> kSigns = [] {
  Codebook<256> made{};
  for (uint32_t signs = 0; signs < 256; signs++) {
    for (int i = 0; i < 8; i++) {
      made.of[signs] |= (signs >> i & 1) << (4 * i + 3);
    }
  }
  return made;
}();
constexpr Codebook<128> kEvenSigns = [] {
  Codebook<128> made{};
  for (uint32_t signs = 0; signs < 128; signs++) {
    uint32_t odd = 0;
    for (int i = 0; i < 7; i++) {
      odd ^= signs >> i & 1;
    }
    made.of[signs] = kSigns.of[signs | odd << 7];
  }
  return made;
}();

constexpr int kWordsPerHalf = 32;
using HalfWords = uint32_t[kWordsPerHalf];

template <class Magnitude>
constexpr Table signed_table(Magnitude magnitude) {
  return table_of(
      [=](int i) { return i & 8 ? -magnitude(i & 7) : magnitude(i); });
}

struct Iq1Words {
  static constexpr Table table = table_of([](int i) { return 2 * i - 9; });
};
struct Iq2Words {
  static constexpr Table table = signed_table([](int i) {
    return i == 0 ? 8 : i == 1 ? 25 : 43;
  });
};

// `load` makes the words of all columns.
template <Family family>
struct Codewords;

template <>
struct Codewords<Family::iq1_m> : Iq1Words {
  static GLM_INLINE void load(const uint8_t* half, HalfWords& words) {
    for (int lane = 0; lane < kHalf; lane++) {
      const uint32_t heads = half[32 + lane];
      const uint32_t first = half[2 * lane], second = half[2 * lane + 1];
      words[2 * lane] = kIq1Rows.of[first | (heads & 15) << 8];
      words[2 * lane + 1] = kIq1Rows.of[second | heads >> 4 << 8];
    }
  }
};
template <>
struct Codewords<Family::iq1_s> : Iq1Words {
  static GLM_INLINE void load(const uint8_t* half, HalfWords& words) {
    for (int four = 0; four < 8; four++) {
      const uint32_t head = ::gguf::two_bytes(half + 34 + 2 * four);
      for (int j = 0; j < 4; j++) {
        const uint32_t high = (head >> 3 * j & 7) | head >> 15 << 3;
        words[4 * four + j] = kIq1Rows.of[half[2 + 4 * four + j] | high << 8];
      }
    }
  }
};
template <>
struct Codewords<Family::iq2_xxs> : Iq2Words {
  static GLM_INLINE void load(const uint8_t* half, HalfWords& words) {
    for (int four = 0; four < 8; four++) {
      const uint8_t* rows = half + 2 + 8 * four;
      const uint32_t signs = ::gguf::four_bytes(rows + 4);
      for (int j = 0; j < 4; j++) {
        words[4 * four + j] =
            kIq2XxsRows.of[rows[j]] | kEvenSigns.of[signs >> 7 * j & 127];
      }
    }
  }
};
template <>
struct Codewords<Family::iq2_xs> : Iq2Words {
  static GLM_INLINE void load(const uint8_t* half, HalfWords& words) {
    for (int g = 0; g < kWordsPerHalf; g++) {
      const uint32_t both = ::gguf::two_bytes(half + 2 + 2 * g);
      words[g] = kIq2XsRows.of[both & 511] | kEvenSigns.of[both >> 9];
    }
  }
};
template <>
struct Codewords<Family::iq2_s> : Iq2Words {
  static GLM_INLINE void load(const uint8_t* half, HalfWords& words) {
    for (int g = 0; g < kWordsPerHalf; g++) {
      const uint32_t high = half[66 + g / 4] >> g % 4 * 2 & 3;
      words[g] =
          kIq2SRows.of[half[2 + g] | high << 8] | kSigns.of[half[34 + g]];
    }
  }
};
template <>
struct Codewords<Family::iq3_xxs> {
  static constexpr Table table =
      signed_table([](int i) { return i == 7 ? 62 : 8 * i + 4; });
  static GLM_INLINE void load(const uint8_t* half, HalfWords& words) {
    for (int g = 0; g < kWordsPerHalf; g++) {
      const uint8_t* rows = half + 2 + 2 * g;
      const uint32_t signs = ::gguf::four_bytes(half + 66 + g / 4 * 4);
      const uint32_t low = kIq3XxsRows.of[rows[0]];
      const uint32_t high = kIq3XxsRows.of[rows[1]];
      words[g] = low | high << 16 | kEvenSigns.of[signs >> g % 4 * 7 & 127];
    }
  }
};
template <>
struct Codewords<Family::iq3_s> {
  static constexpr Table table = signed_table([](int i) { return 2 * i + 1; });
  static GLM_INLINE void load(const uint8_t* half, HalfWords& words) {
    for (int g = 0; g < kWordsPerHalf; g++) {
      const uint8_t* rows = half + 2 + 2 * g;
      const uint32_t tops = half[66 + g / 4] >> g % 4 * 2;
      const uint32_t low = kIq3SRows.of[rows[0] | (tops & 1) << 8];
      const uint32_t high = kIq3SRows.of[rows[1] | (tops & 2) << 7];
      words[g] = low | high << 16 | kSigns.of[half[74 + g]];
    }
  }
};

}  // namespace
