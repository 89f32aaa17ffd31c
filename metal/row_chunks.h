// Eight neighbouring values of a row, of queries or of cached rows: they are
// asked for in wide units, and stay as they lie in memory until they are
// needed, so that no thread waits for them before.
#pragma once

#include "cached_rows.h"

GLM_CONST int kChunk = 8;  // values

// Reads words in units of 4, 8 or 16 bytes, of which `from` is a multiple.
template <int words, int unit>
METAL_FUNC void load_words(const device uint8_t* from, thread uint* to) {
  if constexpr (unit > 4) {
    constexpr int each = unit / 4;
    GLM_UNROLL
    for (int i = 0; i < words / each; i++) {
      const vec<uint, each> read = ((const device vec<uint, each>*)from)[i];
      GLM_UNROLL
      for (int j = 0; j < each; j++) {
        to[i * each + j] = read[j];
      }
    }
  } else {
    GLM_UNROLL
    for (int i = 0; i < words; i++) {
      to[i] = ((const device uint*)from)[i];
    }
  }
}

// Gives the i-th of the values that lie in words.
METAL_FUNC float
value_in(const thread uint* words, int i, glm_fused::As<float>) {
  return as_type<float>(words[i]);
}

METAL_FUNC float
value_in(const thread uint* words, int i, glm_fused::As<half>) {
  const ushort bits = words[i / 2] >> (i % 2 * 16);
  return static_cast<float>(as_type<half>(bits));
}

METAL_FUNC float
value_in(const thread uint* words, int i, glm_fused::As<bfloat>) {
  const uint word = words[i / 2];
  return as_type<float>(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

// A chunk of rows R. With `wide`, it lies within the latent or within the RoPE
// key, and begins at a multiple of `unit` bytes, or of its own size where that
// is less; else it lies anywhere.
template <typename R, int unit, bool wide = (unit > 0)>
struct Chunk;

template <typename R, int unit>
struct Chunk<R, unit, false> {
  float values[kChunk];

  // Reads what there is before column `end` of a row.
  METAL_FUNC void load(const thread R& rows, int row, int column, int end)
      thread {
    GLM_UNROLL
    for (int i = 0; i < kChunk; i++) {
      values[i] = column + i < end ? rows.value(row, column + i) : 0.0f;
    }
  }
  METAL_FUNC void clear() thread {
    GLM_UNROLL
    for (int i = 0; i < kChunk; i++) {
      values[i] = 0;
    }
  }
  METAL_FUNC float value(int i) const thread {
    return values[i];
  }
};

template <typename T, typename U, int unit>
struct Chunk<FloatRows<T, U>, unit, true> {
  GLM_CONST int latent_words = kChunk * int(sizeof(T)) / 4;
  GLM_CONST int rope_words = kChunk * int(sizeof(U)) / 4;
  uint words[latent_words > rope_words ? latent_words : rope_words];
  bool rope;

  METAL_FUNC void
  load(const thread FloatRows<T, U>& rows, int row, int column, int) thread {
    rope = column >= rows.rank;
    if (rope) {
      const device uint8_t* from = rows.ropes + row * rows.rope_stride;
      load_words<rope_words, unit>(
          from + (column - rows.rank) * int(sizeof(U)), words);
    } else {
      const device uint8_t* from = rows.latents + row * rows.latent_stride;
      load_words<latent_words, unit>(from + column * int(sizeof(T)), words);
    }
  }
  METAL_FUNC void clear() thread {
    rope = false;
    GLM_UNROLL
    for (int i = 0; i < latent_words; i++) {
      words[i] = 0;
    }
  }
  METAL_FUNC float value(int i) const thread {
    return rope ? value_in(words, i, glm_fused::As<U>())
                : value_in(words, i, glm_fused::As<T>());
  }
};

template <typename Code, int unit>
struct Chunk<PackedRows<Code>, unit, true> {
  GLM_CONST int code_words = kChunk / 4;
  GLM_CONST int rope_words = kChunk / 2;
  uint words[rope_words];
  float scale;
  bool rope;

  METAL_FUNC void
  load(const thread PackedRows<Code>& rows, int row, int column, int) thread {
    const device uint8_t* from = rows.latents + row * rows.latent_stride;
    const device float* scales = (const device float*)(from + rows.rank);
    rope = column >= rows.rank;
    if (rope) {
      const device float* end = scales + Code::scales(rows.rank);
      load_words<rope_words, unit>(
          (const device uint8_t*)end + (column - rows.rank) * 2, words);
    } else {
      load_words<code_words, (unit < kChunk ? unit : kChunk)>(
          from + column, words);
      scale = scales[Code::scale_of(column)];
    }
  }
  METAL_FUNC void clear() thread {
    rope = false;
    scale = 0;
    GLM_UNROLL
    for (int i = 0; i < code_words; i++) {
      words[i] = 0;
    }
  }
  METAL_FUNC float value(int i) const thread {
    if (rope) {
      return value_in(words, i, glm_fused::As<bfloat>());
    }
    return Code::decode(uint8_t(words[i / 4] >> (i % 4 * 8))) * scale;
  }
};
