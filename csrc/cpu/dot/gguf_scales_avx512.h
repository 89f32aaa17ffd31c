// The scales of half a block of GGUF's formats on AVX-512. Only
// gguf_kernels_body.h includes this.
#pragma once

namespace {

// A half of every lane.
GLM_INLINE F16 splat_half(uint32_t bits) {
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(bits)));
}
GLM_INLINE F16 splat_half(const uint8_t* p) {
  return splat_half(::gguf::two_bytes(p));
}
GLM_INLINE F16 negative(F16 a) {
  return _mm512_xor_ps(a, splat(-0.0f));
}

// Which of 16 bytes each lane takes, by how many bits it is shifted, and what
// is kept of it.
struct Picks {
  alignas(16) uint8_t byte[kHalf];
  Numbers shift;
  Numbers mask;
};
template <class Byte, class Shift, class Mask>
constexpr Picks picks(Byte byte, Shift shift, Mask mask) {
  Picks made{{}, numbers(shift), numbers(mask)};
  for (int lane = 0; lane < kHalf; lane++) {
    made.byte[lane] = static_cast<uint8_t>(byte(lane));
  }
  return made;
}
GLM_INLINE U16 picked(__m128i bytes, const Picks& p) {
  const U16 each =
      _mm512_cvtepu8_epi32(_mm_shuffle_epi8(bytes, load16(p.byte)));
  const U16 moved = _mm512_srlv_epi32(each, load_numbers(p.shift));
  return _mm512_and_si512(moved, load_numbers(p.mask));
}
GLM_INLINE __m128i load8(const uint8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
GLM_INLINE __m128i load4(const uint8_t* p) {
  return _mm_cvtsi32_si128(static_cast<int>(::gguf::four_bytes(p)));
}

// LaneScales: the scales, and biases where there are any, of a whole
// half-block.

// Eight blocks with a half each.
template <int stride>
struct EightHalves {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    // Put together by integer units, which have less to do.
    uint64_t four[2] = {};
    for_each_constant<8>(GLM_EACH(i) {
      const uint64_t one = ::gguf::two_bytes(half + stride * i);
      four[i / 4] |= one << 16 * (i % 4);
    });
    const __m128i all = _mm_set_epi64x(
        static_cast<int64_t>(four[1]), static_cast<int64_t>(four[0]));
    scale = each_twice(_mm256_cvtph_ps(all));
  }
};
template <>
struct LaneScales<Family::q8_0> : EightHalves<34> {};
template <>
struct LaneScales<Family::q4_0> : EightHalves<18> {};
template <>
struct LaneScales<Family::q5_0> : EightHalves<22> {};
template <>
struct LaneScales<Family::iq4_nl> : EightHalves<18> {};
template <>
struct LaneScales<Family::ggml_mxfp4> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    uint64_t eight = 0;
    for_each_constant<8>(
        GLM_EACH(i) { eight |= uint64_t{half[17 * i]} << 8 * i; });
    const __m256i e =
        _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(eight)));
    const __m256i one = _mm256_set1_epi32(1);
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(e, one), 23);
    const __m256i tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), e);
    const __m256i bits =
        _mm256_blendv_epi8(tiny, normal, _mm256_cmpgt_epi32(e, one));
    scale = each_twice(_mm256_castsi256_ps(bits));
  }
};

template <>
struct LaneScales<Family::q2_k> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16& bias) {
    const U16 each = _mm512_cvtepu8_epi32(load16(half));
    scale = mul(splat_half(half + 80), to_float(bits_and(each, 15)));
    bias = negative(mul(splat_half(half + 82), to_float(shift_right<4>(each))));
  }
};
template <>
struct LaneScales<Family::q3_k> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    static constexpr Picks low = picks(
        [](int l) { return 2 + l % 8; },
        [](int l) { return l / 8 * 4; },
        [](int) { return 15; });
    static constexpr Picks high = picks(
        [](int l) { return 10 + l % 4; },
        [](int l) { return l / 4 * 2; },
        [](int) { return 3; });
    const __m128i bytes = load16(half + 94);  // which end with the block
    const U16 bits =
        bits_or(picked(bytes, low), shift_left<4>(picked(bytes, high)));
    scale = mul(splat_half(half + 108), to_float(add_words(bits, -32u)));
  }
};

// Six bits of a scale and of a minimum for a pair of lanes: both are made in
// one register, the minima in its upper half.
struct PairedScales {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16& bias) {
    // A byte with the lower bits and, of the last four of eight, one whose
    // highest two are the upper bits.
    static constexpr Controls bytes = controls([](int b) {
      const int l = b / 4, i = l % 8, first = l / 8 * 4;
      return b % 4 == 0          ? (i < 4 ? 4 + first + i : 8 + i)
          : b % 4 == 1 && i >= 4 ? first + i
                                 : kNoByte;
    });
    static constexpr Numbers shift =
        numbers([](int l) { return l < 12 ? 0 : 4; });
    static constexpr Numbers mask =
        numbers([](int l) { return l % 8 < 4 ? 63 : 15; });
    static constexpr Numbers factor = numbers([](int l) { return l / 8; });
    static constexpr Numbers minima = numbers([](int l) { return 8 + l / 2; });
    const U16 each = in_parts(half, bytes);
    const U16 low = _mm512_and_si512(
        _mm512_srlv_epi32(each, load_numbers(shift)), load_numbers(mask));
    const U16 bits = merged(shift_right<10>(each), 48, low, ~0u);
    const __m128 halves = _mm_xor_ps(
        _mm_cvtph_ps(load4(half)), _mm_setr_ps(0.0f, -0.0f, 0.0f, 0.0f));
    const F16 both =
        mul(_mm512_permutexvar_ps(
                load_numbers(factor), _mm512_castps128_ps512(halves)),
            to_float(bits));
    scale = _mm512_permutexvar_ps(load_numbers(kPairs), both);
    bias = _mm512_permutexvar_ps(load_numbers(minima), both);
  }
};
template <>
struct LaneScales<Family::q4_k> : PairedScales {};
template <>
struct LaneScales<Family::q5_k> : PairedScales {};
template <>
struct LaneScales<Family::q6_k> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    const U16 each = _mm512_cvtepi8_epi32(load16(half + 192));
    scale = mul(splat_half(half + 208), to_float(each));
  }
};

// d * (2 bits + 1) / 8 for the lowest three bits; its second product is exact.
GLM_INLINE F16 iq1_scale(F16 d, U16 bits) {
  static constexpr Table eighths =
      table_of([](int i) { return static_cast<float>(2 * (i & 7) + 1) / 8; });
  return mul(d, Table16(eighths.of)(bits));
}
template <>
struct LaneScales<Family::iq1_s> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    const __m256i words = _mm256_cvtepu16_epi32(load16(half + 34));
    scale = iq1_scale(splat_half(half), shift_right<12>(each_twice(words)));
  }
};
template <>
struct LaneScales<Family::iq1_m> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    static constexpr Controls word = controls(
        [](int i) { return i % 4 < 2 ? i / 16 * 2 + i % 2 : kNoByte; });
    static constexpr Numbers shift = numbers([](int l) { return l % 4 * 3; });
    uint64_t v;
    memcpy(&v, half + 48, 8);
    const uint64_t d = (v >> 12 & 0xf) | (v >> 24 & 0xf0) | (v >> 36 & 0xf00) |
        (v >> 48 & 0xf000);
    const U16 words = _mm512_shuffle_epi8(
        _mm512_set1_epi64(static_cast<int64_t>(v)), load_words(word.of));
    scale = iq1_scale(
        splat_half(static_cast<uint32_t>(d)),
        _mm512_srlv_epi32(words, load_numbers(shift)));
  }
};

// d * (bits + 1/2) * factor.
GLM_INLINE F16 half_steps(F16 d, U16 bits, float factor) {
  return mul(mul(d, add(to_float(bits), splat(0.5f))), splat(factor));
}
template <>
struct LaneScales<Family::iq2_xxs> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    static constexpr Numbers word =
        numbers([](int l) { return l / 2 * 2 + 1; });
    const U16 words =
        _mm512_permutexvar_epi32(load_numbers(word), load_words(half + 2));
    scale = half_steps(splat_half(half), shift_right<28>(words), 0.25f);
  }
};
// A nibble for each lane.
GLM_INLINE U16 lane_nibbles(const uint8_t* p) {
  static constexpr Picks nibbles = picks(
      [](int l) { return l / 2; },
      [](int l) { return l % 2 * 4; },
      [](int) { return 15; });
  return picked(load8(p), nibbles);
}
// And for each pair of lanes.
GLM_INLINE U16 pair_nibbles(const uint8_t* p) {
  static constexpr Picks nibbles = picks(
      [](int l) { return l / 4; },
      [](int l) { return l / 2 % 2 * 4; },
      [](int) { return 15; });
  return picked(load4(p), nibbles);
}
template <>
struct LaneScales<Family::iq2_xs> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    scale = half_steps(splat_half(half), lane_nibbles(half + 66), 0.25f);
  }
};
template <>
struct LaneScales<Family::iq2_s> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    scale = half_steps(splat_half(half), lane_nibbles(half + 74), 0.25f);
  }
};
template <>
struct LaneScales<Family::iq3_xxs> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    const __m256i words =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + 66));
    scale =
        half_steps(splat_half(half), shift_right<28>(each_twice(words)), 0.5f);
  }
};
template <>
struct LaneScales<Family::iq3_s> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    const U16 odd = add_words(shift_left<1>(pair_nibbles(half + 106)), 1);
    scale = mul(splat_half(half), to_float(odd));
  }
};
template <>
struct LaneScales<Family::iq4_xs> {
  static GLM_INLINE void load(const uint8_t* half, F16& scale, F16&) {
    static constexpr Numbers shift = numbers([](int l) { return l / 2 * 2; });
    const U16 tops = _mm512_srlv_epi32(
        _mm512_set1_epi32(static_cast<int>(::gguf::two_bytes(half + 2))),
        load_numbers(shift));
    const U16 bits =
        bits_or(pair_nibbles(half + 4), shift_left<4>(bits_and(tops, 3)));
    scale = mul(splat_half(half), to_float(add_words(bits, -32u)));
  }
};

}  // namespace
