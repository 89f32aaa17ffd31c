// A cached row is a latent with its RoPE key, or an indexer key; this is how it
// is stored.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats/format.h"

namespace glm_fused {

// The packed rows are bytes:
//   fp8   rank e4m3 codes | fp32 scale per 128 of them | rope bfloat16 values
//   int8  rank int8 codes | one fp32 scale             | rope bfloat16 values
// A value is the fp32 product of its code and its scale; the e4m3 NaN codes,
// which no row holds, read as 480 and -480.
enum class RowFormat : uint8_t { floating, fp8, int8 };

constexpr int kScaleTile = 128;  // values that share an fp8 scale

inline size_t scale_count(RowFormat format, int rank) {
  return format == RowFormat::floating ? 0
      : format == RowFormat::int8      ? 1
                                       : (rank - 1) / kScaleTile + 1;
}

inline size_t packed_row_bytes(RowFormat format, int rank, int rope) {
  return rank + 4 * scale_count(format, rank) + 2 * static_cast<size_t>(rope);
}

// A layout says what a row holds; an indexer key has no RoPE part of its own.
struct RowLayout {
  RowFormat format;
  int rank, rope;
};

// A row has `rank` values and `rope` values, each part in its own place.
struct Row {
  const uint8_t* latent;
  const uint8_t* scales;  // fp32, unaligned; null for floating
  const uint8_t* rope;
};

// These are the rows of one sequence.
struct Rows {
  RowFormat format;
  FloatType latent_type, rope_type;  // rope_type is bfloat16 where packed
  int rank, rope_dim;
  const uint8_t* latents;
  size_t latent_stride;  // bytes
  const uint8_t* ropes;  // floating only
  size_t rope_stride;

  Row operator[](size_t i) const {
    const uint8_t* row = latents + i * latent_stride;
    if (format == RowFormat::floating) {
      return {row, nullptr, ropes + i * rope_stride};
    }
    const uint8_t* scales = row + rank;
    return {row, scales, scales + 4 * scale_count(format, rank)};
  }
};

}  // namespace glm_fused
