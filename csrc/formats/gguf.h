// GGUF's block formats. A lane owns 16 columns of a block and sums their
// products with the block's codes, one after the other; its scale multiplies
// the sum. Planes: weight, the blocks as they lie in a file. What a block's
// bytes mean is the shaders' own text.
#pragma once

#include <type_traits>

#include "formats/decode.h"

#define GLM_CONST static constexpr
#define GLM_BLOCK inline __attribute__((always_inline))

namespace gguf {

using glm_fused::float_of;

GLM_BLOCK float half_value(uint32_t bits) {
  return glm_fused::from_float16(static_cast<uint16_t>(bits));
}

}  // namespace gguf

#include "metal/formats/gguf_blocks.h"
#include "metal/formats/gguf_codebook_grids.h"
#include "metal/formats/gguf_codebooks.h"

#undef GLM_CONST
#undef GLM_BLOCK

namespace glm_fused {

// The type of a family's blocks, and its name in the shaders.
template <Family family>
struct BlockOf;

#define GLM_GGUF_BLOCK(family, block, ...)                 \
  template <>                                              \
  struct BlockOf<Family::family> {                         \
    using type = ::gguf::block;                            \
    static constexpr const char* shader = "gguf::" #block; \
  };
GLM_GGUF_FORMATS(GLM_GGUF_BLOCK)
#undef GLM_GGUF_BLOCK

template <Family family>
class GgufRow {
 public:
  using Block = BlockOf<family>::type;

  GgufRow(const Format&, const uint8_t* const* planes) : weight_(planes[0]) {}

  static int values(const Format&, bool) {
    return kValues;
  }
  static std::string
  shader(const Format&, const std::string&, bool whole_tiles) {
    return std::string("Gguf<") + BlockOf<family>::shader +
        (whole_tiles ? ", true>" : ", false>");
  }

  // The values of a lane lie in one block.
  void add(const float* x, int column, int values, float& result) const {
    const Lane lane(*this, column);
    float accum = 0, sum = 0;
    for (int v = 0; v < values; v++) {
      accum = std::fma(x[v], static_cast<float>(lane.codes[v]), accum);
    }
    if constexpr (!Block::biased) {
      result = std::fma(lane.scale, accum, result);
      return;
    }
    for (int v = 0; v < values; v += 4) {
      sum = sum + (x[v] + x[v + 1] + x[v + 2] + x[v + 3]);
    }
    result = result + std::fma(lane.scale, accum, sum * lane.bias);
  }

  static float total(float sum) {
    return sum;
  }

  // Values as ggml makes them, of whole lanes.
  void embedded(int column, int count, float* to) const {
    for (int at = 0; at < count; at += kValues) {
      const Lane lane(*this, column + at);
      for (int v = 0; v < kValues; v++) {
        const float scaled = lane.scale * static_cast<float>(lane.codes[v]);
        to[at + v] = Block::biased ? scaled + lane.bias : scaled;
      }
    }
  }

  static constexpr int kValues = ::gguf::kLaneColumns;

 private:
  struct Lane {
    int8_t codes[kValues];
    float scale, bias;

    Lane(const GgufRow& row, int column) {
      const size_t block = column / Block::columns;
      const uint8_t* at = row.weight_ + block * Block::bytes;
      const int lane = column % Block::columns / kValues;
      Block::codes(at, lane, codes);
      scale = Block::scale(at, lane);
      bias = Block::bias(at, lane);
    }
  };

  const uint8_t* weight_;
};

template <Family family>
  requires(is_gguf(family))
struct RowOf<family> {
  using type = GgufRow<family>;
};

}  // namespace glm_fused
