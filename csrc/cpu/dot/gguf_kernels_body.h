// The kernels of GGUF's block formats on one instruction set. The formats share
// them, since they differ by how half a block of lanes becomes signed bytes and
// scales alone. Only gguf_kernels_<isa>.cpp include this.
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

// What formats have of their own, where the generic way is too slow.
template <Family family>
struct TableWords;
template <Family family>
struct ByteWords;
template <Family family>
struct LaneScales;

}  // namespace

#if defined(GLM_AVX512)
#include "cpu/dot/gguf_lane_words_avx512.h"
#include "cpu/dot/gguf_scales_avx512.h"
#endif

namespace {

// What the words of a lane's 16 columns hold: signed bytes, or bytes or nibbles
// that are the places of values in a table.
enum class Words : uint8_t { bytes, table, nibbles };

// What a format does with half a block, 256 columns: a super-block, or eight
// blocks of 32.
struct HalfDecode {
  size_t bytes;
  const Kernel* kernel;
  const Table* table;
  void (*words)(const uint8_t* half, U16* words);
  // Of the first `lanes`; zeros of the others.
  void (*scales)(const uint8_t* half, int lanes, F16& scale, F16& bias);
};

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
void bytes_by_lane(const uint8_t* half, U16* words) {
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

template <Family family>
void scales_of(const uint8_t* half, int lanes, F16& scale, F16& bias) {
  if constexpr (requires { LaneScales<family>::load(half, scale, bias); }) {
    if (lanes == kHalf) {
      return LaneScales<family>::load(half, scale, bias);
    }
  }
  scales_by_lane<typename glm_fused::BlockOf<family>::type>(
      half, lanes, scale, bias);
}

template <Family family>
constexpr Words words_kind() {
  if constexpr (requires { Codewords<family>::table; }) {
    return Words::nibbles;
  } else if constexpr (requires { TableWords<family>::table; }) {
    return Words::table;
  } else {
    return Words::bytes;
  }
}

template <Family family>
void words_of(const uint8_t* half, U16* words) {
  if constexpr (words_kind<family>() == Words::nibbles) {
    alignas(64) HalfWords each;
    Codewords<family>::load(half, each);
    load_pairs(reinterpret_cast<const uint8_t*>(each), words[0], words[1]);
  } else if constexpr (words_kind<family>() == Words::table) {
    U16 four[4];
    TableWords<family>::load(half, four);
    memcpy(words, four, sizeof(four));
  } else if constexpr (requires(U16(&w)[4]) {
                         ByteWords<family>::load(half, w);
                       }) {
    U16 four[4];
    ByteWords<family>::load(half, four);
    memcpy(words, four, sizeof(four));
  } else {
    bytes_by_lane<typename glm_fused::BlockOf<family>::type>(half, words);
  }
}

template <Family family>
constexpr const Table* table_for() {
  if constexpr (words_kind<family>() == Words::nibbles) {
    return &Codewords<family>::table;
  } else if constexpr (words_kind<family>() == Words::table) {
    return &TableWords<family>::table;
  } else {
    return nullptr;
  }
}

template <Words kind, bool biased>
class GgufBlocks;

template <Family family>
const HalfDecode& decode_of() {
  using Block = glm_fused::BlockOf<family>::type;
  static constexpr HalfDecode decode{
      static_cast<size_t>(kHalfColumns / Block::columns * Block::bytes),
      &kernel<GgufBlocks<words_kind<family>(), Block::biased>>,
      table_for<family>(),
      words_of<family>,
      scales_of<family>};
  return decode;
}

const HalfDecode& decode_of(Family family) {
#define GLM_GGUF_CASE(name, ...) \
  case Family::name:             \
    return decode_of<Family::name>();
  switch (family) {
    GLM_GGUF_FORMATS(GLM_GGUF_CASE)
    default:
      __builtin_unreachable();
  }
#undef GLM_GGUF_CASE
}

// result += scale * accum, or the sum of that and bias * sum of x, for lanes
// whose scales lie among the codes.
template <bool biased>
class BlockScales {
 public:
  GLM_INLINE BlockScales(const DotArgs& a, int)
      : decode_(decode_of(a.format.family())), lanes_(a.k / kLaneColumns) {}

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
    const int lanes =
        Reading::kInPlace ? kHalf : std::min(lanes_ - hb * kHalf, kHalf);
    const uint8_t* half = rows.weight + hb * decode_.bytes;
    F16 scale[R], bias[R];
    for (int r = 0; r < R; r++) {
      decode_.scales(half + r * rows.weight_stride, lanes, scale[r], bias[r]);
    }
    unroll<R>(GLM_EACH(r) {
      unroll<M>(GLM_EACH(m) {
        if constexpr (biased) {
          const F16 offset = mul(load(sums + m * kHalf), bias[r]);
          result[r][m] = add(result[r][m], fma(scale[r], acc[r][m], offset));
        } else {
          result[r][m] = fma(scale[r], acc[r][m], result[r][m]);
        }
      });
    });
  }

  static GLM_INLINE float total(float sum) {
    return sum;
  }

 private:
  const HalfDecode& decode_;
  const int lanes_;  // of a row
};

template <int count>
struct BlockWords {
  static constexpr size_t kOverread = 0;
  U16 w[count];
};

template <::Words kind, bool biased>
class GgufBlocks {
 public:
  static constexpr int kValues = kLaneColumns;
  static constexpr size_t kMostHalfBytes = 8 * 34;  // q8_0's
  static constexpr int kTerms = kValues;
  static constexpr bool kQuads = false;
  static constexpr bool kCarriesAccumulator = false;
  static constexpr int kSumStep = biased ? 4 : 0;
  using Words = BlockWords<kind == ::Words::nibbles ? 2 : 4>;
  using Scales = BlockScales<biased>;

  GLM_INLINE explicit GgufBlocks(const glm_fused::Format& format)
      : decode_(decode_of(format.family())),
        table_(kind == ::Words::bytes ? kNone.of : decode_.table->of) {}

  GLM_INLINE size_t half_bytes() const {
    return decode_.bytes;
  }

  GLM_INLINE void load(Words& words, const uint8_t* half) const {
    decode_.words(half, words.w);
  }

  static constexpr Term term(int p) {
    return {p, p, 0xff, 1.0f, 1.0f};
  }
  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    if constexpr (kind == ::Words::nibbles) {
      return table_(shift_right<4 * (p % 8)>(words.w[p / 8]));
    } else if constexpr (kind == ::Words::table) {
      return table_(shift_right<8 * (p % 4)>(words.w[p / 4]));
    } else {
      const U16 top = shift_left<24 - 8 * (p % 4)>(words.w[p / 4]);
      return to_float(shift_right_signed<24>(top));
    }
  }

 private:
  static constexpr Table kNone{};

  const HalfDecode& decode_;
  const Table16 table_;
};

const Kernel& kernel_of(const glm_fused::Format& format) {
  return *decode_of(format.family()).kernel;
}

}  // namespace
