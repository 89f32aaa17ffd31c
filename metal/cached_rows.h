// Cached rows are read as fp32: a latent and its RoPE key, or an indexer key.
//
// FloatRows<T, U>: `rank` values of type T in one array, `rope` of type U in
// another.
//
// Fp8Rows: one array, whose rows are `rank` e4m3 codes, an fp32 scale for every
// 128 of them, and `rope` bfloat16 values.
//
// Int8Rows: one array, whose rows are `rank` int8 codes, one fp32 scale, and
// `rope` bfloat16 values.
#pragma once

#include "numbers.h"
#include "params.h"

METAL_FUNC float read_float(const device uint8_t* p) {
  return as_type<float>(
      uint(p[0]) | uint(p[1]) << 8 | uint(p[2]) << 16 | uint(p[3]) << 24);
}

METAL_FUNC float read_bfloat(const device uint8_t* p) {
  return as_type<float>(uint(p[0]) << 16 | uint(p[1]) << 24);
}

template <typename T, typename U>
struct FloatRows {
  const device uint8_t* latents;
  const device uint8_t* ropes;
  int rank;
  long latent_stride;
  long rope_stride;

  METAL_FUNC float value(int key, int column) const thread {
    if (column < rank) {
      return ((const device T*)(latents + key * latent_stride))[column];
    }
    return ((const device U*)(ropes + key * rope_stride))[column - rank];
  }
};

struct Fp8Code {
  GLM_CONST int tile = 128;  // so many values share a scale
  static METAL_FUNC int scales(int rank) {
    return (rank + tile - 1) / tile;
  }
  static METAL_FUNC int scale_of(int column) {
    return column / tile;
  }
  static METAL_FUNC float decode(uint8_t code) {
    const ushort half_bits =
        ushort(code & 0x80) << 8 | ushort(code & 0x7f) << 7;
    return static_cast<float>(as_type<half>(half_bits)) * 256.0f;
  }
};

struct Int8Code {
  static METAL_FUNC int scales(int) {
    return 1;
  }
  static METAL_FUNC int scale_of(int) {
    return 0;
  }
  static METAL_FUNC float decode(uint8_t code) {
    return static_cast<float>(static_cast<int8_t>(code));
  }
};

template <typename Code>
struct PackedRows {
  const device uint8_t* latents;
  const device uint8_t* ropes;
  int rank;
  long latent_stride;
  long rope_stride;

  METAL_FUNC float value(int key, int column) const thread {
    const device uint8_t* row = latents + key * latent_stride;
    const device uint8_t* scales = row + rank;
    if (column < rank) {
      const float scale = read_float(scales + 4 * Code::scale_of(column));
      return Code::decode(row[column]) * scale;
    }
    const device uint8_t* rope = scales + 4 * Code::scales(rank);
    return read_bfloat(rope + 2 * (column - rank));
  }
};

typedef PackedRows<Fp8Code> Fp8Rows;
typedef PackedRows<Int8Code> Int8Rows;

// Gives the rows of sequence `b`.
template <typename R>
METAL_FUNC R rows_of(
    const device uint8_t* latents,
    const device uint8_t* ropes,
    const constant RowsParams& params,
    int b) {
  return R{
      latents + b * params.latent_sequence,
      ropes + b * params.rope_sequence,
      params.rank,
      params.latent_stride,
      params.rope_stride};
}

// A query sees the keys [low, high): from the sequence's start to its own.
struct Visible {
  int low;
  int high;
};

METAL_FUNC Visible visible_keys(
    const device int* start,
    const constant RowsParams& params,
    int b,
    int query) {
  const int low = clamp(start[b], 0, params.keys);
  return Visible{low, max(low, params.keys - params.queries + query + 1)};
}
