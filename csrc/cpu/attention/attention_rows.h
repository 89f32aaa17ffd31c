// Loads cached rows as fp32, a block of them, or sixteen transposed. This is
// compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention.h"
#include "cpu/attention/attention_simd.h"
#include "row_layout.h"

namespace {

using namespace glm_fused;

inline float read_float(const uint8_t* p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}

inline void prefetch(const uint8_t* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(from + at, 0, 2);
  }
}

// Returns IEEE halves, each a 256th of the value of the e4m3 code in its low
// byte. The NaN code, 0x7f, reads as 480.
GLM_INLINE U16 e4m3_halves(U16 v) {
  const U16 sign = shift_left<8>(bits_and(v, 0x00800080u));
  return bits_or(sign, shift_left<7>(bits_and(v, 0x007f007fu)));
}
GLM_INLINE F16 from_256th(F16 v) {
  return mul(v, splat(256.0f));
}

// Returns the value of the int8 code in byte `at` of every word.
template <int at>
GLM_INLINE F16 signed_byte(U16 v) {
  return to_float(shift_right_signed<24>(shift_left<24 - 8 * at>(v)));
}

// A block of rows: columns [begin, begin + columns) of the rows `keys` are
// loaded as fp32, kSplit floats per row, and the last vector of a row is filled
// up with zeros.
struct BlockArgs {
  const Rows& rows;
  const int32_t* keys;
  int count;
  int begin, columns;
  float* to;
};

// Loads a block. address(row) is where column 0 of a row lies; load16(p, by)
// loads 16 values and multiplies them by scale(row).
template <int size, class Address, class Scale, class Load>
GLM_INLINE void load_block(
    const BlockArgs& a,
    Address&& address,
    Scale&& scale,
    Load&& load16) {
  const int whole = a.columns / kHalf * kHalf, begin = a.begin * size;
  for (int i = 0; i < a.count; i++) {
    const Row row = a.rows[a.keys[i]];
    const uint8_t* from = address(row) + begin;
    const F16 by = scale(row);
    float* to = a.to + i * kSplit;
    for (int c = 0; c < whole; c += kHalf) {
      store(to + c, load16(from + c * size, by));
    }
    if (whole < a.columns) {
      uint8_t tail[size * kHalf] = {};
      memcpy(tail, from + whole * size, (a.columns - whole) * size);
      store(to + whole, load16(tail, by));
    }
  }
}

template <class Address>
GLM_INLINE void
load_floats(const BlockArgs& a, FloatType type, Address&& address) {
  const auto unscaled = [](const Row&) { return zero(); };
  if (type == FloatType::bfloat16) {
    load_block<2>(a, address, unscaled, [](const uint8_t* p, F16) {
      return as_float(shift_left<16>(load_shorts(p)));
    });
  } else if (type == FloatType::float16) {
    load_block<2>(a, address, unscaled, [](const uint8_t* p, F16) {
      return load_halves(p);
    });
  } else {
    load_block<4>(a, address, unscaled, [](const uint8_t* p, F16) {
      return as_float(load_words(p));
    });
  }
}

// Loads a block of latents, whose columns lie within one scale tile.
void load_latents(const BlockArgs& a) {
  const auto latent = [](const Row& row) { return row.latent; };
  const bool fp8 = a.rows.format == RowFormat::fp8;
  const size_t tile = fp8 ? a.begin / kScaleTile : 0;
  const auto scale = [tile](const Row& row) {
    return splat(read_float(row.scales + 4 * tile));
  };
  if (a.rows.format == RowFormat::floating) {
    load_floats(a, a.rows.latent_type, latent);
  } else if (fp8) {
    load_block<1>(a, latent, scale, [](const uint8_t* p, F16 by) {
      const F16 value = half_to_float(e4m3_halves(load_bytes(p)));
      return mul(from_256th(value), by);
    });
  } else {
    load_block<1>(a, latent, scale, [](const uint8_t* p, F16 by) {
      return mul(signed_byte<0>(load_bytes(p)), by);
    });
  }
}

void load_ropes(const BlockArgs& a) {
  load_floats(a, a.rows.rope_type, [](const Row& row) { return row.rope; });
}

// Stores value d of `count` rows, at most 16, which lie `row_bytes` apart, at
// to[d * stride], for d in [0, depth). A word holds 4 / size values, of which
// convert(words, values) makes as many vectors.
template <int size, int stride, class Convert>
GLM_INLINE void load_columns(
    const uint8_t* rows,
    size_t row_bytes,
    int count,
    int depth,
    float* to,
    Convert&& convert) {
  constexpr int per_word = 4 / size, block = 4 * kHalf;
  for (int at = 0; at < depth * size; at += block) {
    U16 words[kHalf];
    const int left = std::min(depth * size - at, block);
    if (count == kHalf && left == block) {
      transpose_words(rows + at, row_bytes, words);
    } else {
      uint8_t padded[kHalf][block] = {};
      for (int i = 0; i < count; i++) {
        memcpy(padded[i], rows + i * row_bytes + at, left);
      }
      transpose_words(padded[0], block, words);
    }
    float* column = to + at / size * stride;
    unroll_each<kHalf>(GLM_EACH(w) {
      F16 values[per_word];
      convert(words[w], values);
      unroll_each<per_word>(GLM_EACH(j) {
        store(column + (w * per_word + j) * stride, values[j]);
      });
    });
  }
}

// Returns the scales that value `at` of rows [first, first + count) is
// multiplied by.
GLM_INLINE F16 load_scales(const Rows& rows, int first, int count, int at) {
  float scales[kHalf] = {};
  const size_t tile = rows.format == RowFormat::fp8 ? at / kScaleTile : 0;
  for (int i = 0; i < count; i++) {
    scales[i] = read_float(rows[first + i].scales + 4 * tile);
  }
  return load(scales);
}

// Stores columns [begin, begin + depth), which lie within one scale tile, of
// the rows [first, first + count), at most 16, at to[d * stride + row].
template <int stride>
void load_transposed(
    const Rows& rows,
    int first,
    int count,
    int begin,
    int depth,
    float* to) {
  const auto columns = [&](auto size, auto convert) {
    const size_t step = rows.latent_stride;
    const uint8_t* from = rows.latents + first * step + begin * size;
    load_columns<size, stride>(from, step, count, depth, to, convert);
  };
  if (rows.format != RowFormat::floating) {
    const F16 by = load_scales(rows, first, count, begin);
    if (rows.format == RowFormat::fp8) {
      columns(Constant<1>(), [by](U16 words, F16* to) GLM_ALWAYS_INLINE {
        split_halves(e4m3_halves(words), to[0], to[2]);
        split_halves(e4m3_halves(shift_right<8>(words)), to[1], to[3]);
        unroll_each<4>(GLM_EACH(j) { to[j] = mul(from_256th(to[j]), by); });
      });
    } else {
      columns(Constant<1>(), [by](U16 words, F16* to) GLM_ALWAYS_INLINE {
        for_each_constant<4>(
            GLM_EACH(j) { to[j] = mul(signed_byte<j>(words), by); });
      });
    }
  } else if (rows.latent_type == FloatType::float32) {
    columns(Constant<4>(), [](U16 words, F16* to) GLM_ALWAYS_INLINE {
      to[0] = as_float(words);
    });
  } else if (rows.latent_type == FloatType::bfloat16) {
    columns(Constant<2>(), [](U16 words, F16* to) GLM_ALWAYS_INLINE {
      to[0] = upper_half<0>(words);
      to[1] = upper_half<1>(words);
    });
  } else {
    columns(Constant<2>(), [](U16 words, F16* to) GLM_ALWAYS_INLINE {
      split_halves(words, to[0], to[1]);
    });
  }
}

}  // namespace
