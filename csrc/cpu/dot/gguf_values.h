// What the codes in the words of GGUF's lanes stand for. Only
// gguf_kernels_body.h includes this.
#pragma once

namespace {

// What the words of a lane's 16 columns hold: signed bytes, bytes or nibbles
// that are the places of values in a table, or, in bytes, codes that are values
// above the least one.
enum class Words : uint8_t { bytes, table, nibbles, counts };

template <Family family>
constexpr Words words_kind() {
  if constexpr (requires { Codewords<family>::table; }) {
    return Words::nibbles;
  } else if constexpr (requires { LaneCodes<family>::table; }) {
    return Words::table;
  } else if constexpr (requires { LaneCodes<family>::counts; }) {
    return Words::counts;
  } else {
    return Words::bytes;
  }
}

// Values<family>::at<bit>: those of the codes from `bit` of the words on.

struct SignedBytes {
  template <int bit>
  GLM_INLINE F16 at(U16 words) const {
    return to_float(shift_right_signed<24>(shift_left<24 - bit>(words)));
  }
};

template <Family family>
constexpr Table table_for() {
  if constexpr (words_kind<family>() == Words::nibbles) {
    return Codewords<family>::table;
  } else {
    return LaneCodes<family>::table;
  }
}

#if defined(GLM_AVX512)

// As the last bits of a float's mantissa, those of a power of two that is
// subtracted then: of the lower half of a word without a shift, while
// permutes and conversions want each code where a word begins.
template <const Counts& counts, int bit>
GLM_INLINE F16 counted(U16 words) {
  constexpr int exponent = 23 - bit + counts.log2_step;
  constexpr uint32_t base = (127u + exponent) << 23;
  constexpr uint32_t mask = ((1u << counts.bits) - 1) << bit;
  constexpr uint32_t flip =
      counts.is_signed ? 1u << (bit + counts.bits - 1) : 0;
  static_assert(bit + counts.bits <= 23);
  // (words & mask) ^ (base | flip)
  const U16 sum = _mm512_ternarylogic_epi32(
      words,
      _mm512_set1_epi32(static_cast<int>(mask)),
      _mm512_set1_epi32(static_cast<int>(base | flip)),
      0x6a);
  constexpr int zero = (1 << exponent) - counts.least;
  return _mm512_sub_ps(as_float(sum), splat(static_cast<float>(zero)));
}

template <Family family>
struct CountedBytes {
  static constexpr Counts kCounts = LaneCodes<family>::counts;
  template <int bit>
  GLM_INLINE F16 at(U16 words) const {
    if constexpr (bit + kCounts.bits <= 23) {
      return counted<kCounts, bit>(words);
    } else {
      return counted<kCounts, bit - 16>(shift_right<16>(words));
    }
  }
};

// The counts that are a table's values, or such of no bits.
constexpr Counts counts_of(const Table& table) {
  const int least = static_cast<int>(table.of[0]);
  const int step = static_cast<int>(table.of[1]) - least;
  for (int i = 0; i < 16; i++) {
    if (table.of[i] != static_cast<float>(least + i * step)) {
      return {};
    }
  }
  int log2 = 0;
  while (1 << log2 < step) {
    log2++;
  }
  return {step == 1 << log2 ? 4 : 0, least, log2};
}

// Where a table's values can be counted, too, some are, so that not all wait
// for the two pipes that permute.
template <Family family>
class TableValues {
 public:
  template <int bit>
  GLM_INLINE F16 at(U16 words) const {
    constexpr bool nibbles = words_kind<family>() == Words::nibbles;
    if constexpr (kCounts.bits == 0) {
      return looked_up<bit>(words);
    } else if constexpr (bit == 8 || (nibbles && bit == 4)) {
      return counted<kCounts, bit>(words);
    } else if constexpr (nibbles && (bit == 20 || bit == 24)) {
      return counted<kCounts, bit - 12>(shift_right<12>(words));
    } else {
      return looked_up<bit>(words);
    }
  }

 private:
  static constexpr Table kTable = table_for<family>();
  static constexpr Counts kCounts = counts_of(kTable);

  template <int bit>
  GLM_INLINE F16 looked_up(U16 words) const {
    if constexpr (bit < 16) {
      return table_(shift_right<bit>(words));
    } else {
      const U16 places = shift_right<bit - 16>(words);
      return as_float(
          _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, upper_.t));
    }
  }

  const Table16 table_{kTable.of};
  // Signed bytes as floats have no bits in their lower halves.
  const UpperTable upper_{kTable.of};
};

#else

template <Family family>
struct TableValues {
  static constexpr Table kTable = table_for<family>();
  const Table16 table{kTable.of};
  template <int bit>
  GLM_INLINE F16 at(U16 words) const {
    return table(shift_right<bit>(words));
  }
};

#endif

template <Family family, Words kind>
struct ValuesOf {
  using type = TableValues<family>;
};
template <Family family>
struct ValuesOf<family, Words::bytes> {
  using type = SignedBytes;
};
#if defined(GLM_AVX512)
template <Family family>
struct ValuesOf<family, Words::counts> {
  using type = CountedBytes<family>;
};
#endif
template <Family family>
using Values = ValuesOf<family, words_kind<family>()>::type;

}  // namespace
