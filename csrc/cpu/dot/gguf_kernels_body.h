// The kernels of GGUF's block formats on one instruction set. They differ by
// how half a block of lanes becomes signed bytes and scales alone. Only
// gguf_kernels_<isa>.cpp include this.
#pragma once

#include "cpu/dot/dot_body.h"
#include "formats/gguf.h"

namespace {

using glm_fused::Family;

constexpr int kLaneColumns = ::gguf::kLaneColumns;
constexpr int kHalfColumns = kHalf * kLaneColumns;

// Sets w[i] to word i of each lane's 16 bytes, of four lanes a register.
GLM_INLINE void quads_of(const U16 (&rows)[4], U16 (&w)[4]) {
  F16 quads[4];
  load_quads(reinterpret_cast<const uint8_t*>(rows), quads);
  memcpy(w, quads, sizeof(w));
}

}  // namespace

#include "cpu/dot/gguf_codebooks.h"

namespace {

// What formats have of their own, where the generic way is too slow: how half a
// block becomes the words of its lanes, with a table where they hold the places
// of values, and its scales.
template <Family family>
struct LaneCodes;
template <Family family>
struct LaneScales;

}  // namespace

#if defined(GLM_AVX512)
#include "cpu/dot/gguf_codewords_avx512.h"
#include "cpu/dot/gguf_lane_words_avx512.h"
#include "cpu/dot/gguf_scales_avx512.h"
#endif
#include "cpu/dot/gguf_values.h"

namespace {

// Calls fn(block, lane of the block, lane of the half) for the first `count`
// lanes.
template <class Block, class Fn>
GLM_INLINE void each_lane(const uint8_t* half, int count, const Fn& fn) {
  constexpr int lanes = Block::columns / kLaneColumns;
  for (int lane = 0; lane < count; lane++) {
    fn(half + lane / lanes * Block::bytes, lane % lanes, lane);
  }
}

// Where nothing faster is known: lane by lane.
template <class Block>
GLM_INLINE void bytes_by_lane(const uint8_t* half, U16 (&words)[4]) {
  alignas(64) int8_t codes[kHalfColumns];
  each_lane<Block>(half, kHalf, [&](const uint8_t* block, int lane, int at) {
    Block::codes(block, lane, codes + at * kLaneColumns);
  });
  F16 quads[4];
  load_quads(reinterpret_cast<const uint8_t*>(codes), quads);
  memcpy(words, quads, sizeof(quads));
}
template <class Block>
GLM_INLINE void
scales_by_lane(const uint8_t* half, int lanes, F16& scale, F16& bias) {
  float scales[kHalf] = {}, biases[kHalf] = {};
  each_lane<Block>(half, lanes, [&](const uint8_t* block, int lane, int at) {
    scales[at] = Block::scale(block, lane);
    biases[at] = Block::bias(block, lane);
  });
  scale = load(scales);
  bias = load(biases);
}

// Half a block, 256 columns: a super-block, or eight blocks of 32.
template <class Block>
constexpr bool kSuperBlock = Block::columns == kHalfColumns;
template <class Block>
constexpr int kHalfBytes = kHalfColumns / Block::columns * Block::bytes;

// result += scale * accum, or the sum of that and bias * sum of x, for lanes
// whose scales lie among the codes.
template <Family family>
class BlockScales {
 public:
  using Block = glm_fused::BlockOf<family>::type;

  GLM_INLINE BlockScales(const DotArgs& a, int) : lanes_(a.k / kLaneColumns) {}

  template <int R>
  GLM_INLINE void locate(TileRows&, int, int) const {}
  GLM_INLINE void prefetch(const uint8_t* const*, int, int) const {}

  template <class Do>
  GLM_INLINE void with_reading(const Do& with) const {
    with(InPlace<0>());
  }

  template <class Reading, int R, int M>
  GLM_INLINE void finish(
      const TileRows& rows,
      int hb,
      const float* sums,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    const uint8_t* half = rows.weight + hb * kHalfBytes<Block>;
    unroll<R>(GLM_EACH(r) {
      F16 scale, bias;
      if (Reading::kInPlace || kSuperBlock<Block> ||
          (hb + 1) * kHalf <= lanes_) {
        whole(half + r * rows.weight_stride, scale, bias);
      } else {
        scales_by_lane<Block>(
            half + r * rows.weight_stride, lanes_ - hb * kHalf, scale, bias);
      }
      unroll<M>(GLM_EACH(m) {
        if constexpr (Block::biased) {
          const F16 offset = mul(load(sums + m * kHalf), bias);
          result[r][m] = add(result[r][m], fma(scale, acc[r][m], offset));
        } else {
          result[r][m] = fma(scale, acc[r][m], result[r][m]);
        }
      });
    });
  }

  static GLM_INLINE float total(float sum) {
    return sum;
  }

 private:
  static GLM_INLINE void whole(const uint8_t* half, F16& scale, F16& bias) {
    if constexpr (requires { LaneScales<family>::load(half, scale, bias); }) {
      LaneScales<family>::load(half, scale, bias);
    } else {
      scales_by_lane<Block>(half, kHalf, scale, bias);
    }
  }

  const int lanes_;  // of a row
};

template <Family family>
struct BlockWords {
  static constexpr size_t kOverread = 0;
  U16 w[words_kind<family>() == Words::nibbles ? 2 : 4];

  GLM_INLINE void load(const uint8_t* half) {
    using Codes = LaneCodes<family>;
    if constexpr (requires { Codes::load(half, w); }) {
      Codes::load(half, w);
    } else if constexpr (words_kind<family>() == Words::nibbles) {
      alignas(64) HalfWords each;
      Codewords<family>::load(half, each);
      load_pairs(reinterpret_cast<const uint8_t*>(each), w[0], w[1]);
    } else {
      bytes_by_lane<typename glm_fused::BlockOf<family>::type>(half, w);
    }
  }
};

template <Family family>
class GgufBlocks {
 public:
  using Block = glm_fused::BlockOf<family>::type;
  static constexpr int kValues = kLaneColumns;
  static constexpr size_t kHalfBytes = ::kHalfBytes<Block>;
  static constexpr int kTerms = kValues;
  static constexpr bool kQuads = false;
  static constexpr bool kCarriesAccumulator = false;
  static constexpr bool kLongRows = true;
  static constexpr bool kWholeRows = kSuperBlock<Block>;
  static constexpr int kSumStep = Block::biased ? 4 : 0;
  using Words = BlockWords<family>;
  using Scales = BlockScales<family>;

  static constexpr Term term(int p) {
    return {p, p, 0xff, 1.0f, 1.0f};
  }
  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    constexpr int bits = kKind == ::Words::nibbles ? 4 : 8, each = 32 / bits;
    return values_.template at<bits*(p % each)>(words.w[p / each]);
  }

 private:
  static constexpr auto kKind = words_kind<family>();

  const Values<family> values_{};
};

}  // namespace

#if defined(GLM_AVX512)
#include "cpu/dot/gguf_looked_up_rows.h"
#endif

namespace {

template <Family family>
void dot_blocks(const DotArgs& args) {
#if defined(GLM_AVX512)
  if constexpr (requires { LaneCodes<family>::grid; }) {
    if (LookedUpRows<family>::takes(args)) {
      return LookedUpRows<family>(args).all();
    }
  }
#endif
  dot<GgufBlocks<family>>(args);
}

template <Family family>
constexpr Kernel block_kernel{
    dot_blocks<family>,
    pack<GgufBlocks<family>>,
    GgufBlocks<family>::kValues,
    floats_per_block<GgufBlocks<family>>};

const Kernel& kernel_of(const glm_fused::Format& format) {
#define GLM_GGUF_CASE(name, ...) \
  case Family::name:             \
    return block_kernel<Family::name>;
  switch (format.family()) {
    GLM_GGUF_FORMATS(GLM_GGUF_CASE)
    default:
      __builtin_unreachable();
  }
#undef GLM_GGUF_CASE
}

}  // namespace
