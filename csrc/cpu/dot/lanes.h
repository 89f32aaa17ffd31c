// How a format's bytes become a lane's fp32 values, plane by plane of terms.
//
// A simdgroup's 32 lanes each own `kValues` consecutive columns of a block.
// A term is one product of the lane's dot product, taken over all lanes: the
// column it multiplies, the byte and mask it is cut from, and the factor MLX
// moves from the masked weight to x. Columns whose bits straddle two bytes
// have two terms.
#pragma once

#include <concepts>
#include <iterator>

#include "cpu/dot/dot_kernels.h"
#include "cpu/runtime/simd.h"

namespace {

struct Term {
  int value;
  int byte;
  uint32_t mask;
  float scale;  // x_thread[value] = x * scale …
  float carry;  // … * carry, for the second byte of a straddling column
};

// What a format's header offers the CPU kernels of one instruction set: a type
// for each lane order. Half a block is the bytes of 16 lanes; they follow one
// another in plane 0, and `Words` takes a lane's words from them. `decode<p>`
// gives term p of the 16 lanes; a format whose codes may be NaN may leave that
// to `with_nan`, of a term or of their sum. `Scales` turns a half-block's sum
// of terms into its part of the result, from whatever planes (or headers of
// blocks in plane 0) it was told at `locate`, and the sum over all lanes into
// the product.
template <class F>
concept CpuDecode = requires(const F f, const typename F::Words words) {
  { F::kValues } -> std::convertible_to<int>;        // columns of a lane
  { F::kHalfBytes } -> std::convertible_to<size_t>;  // of 16 lanes, plane 0
  { F::Words::kOverread } -> std::convertible_to<size_t>;  // loaded past them
  { F::kTerms } -> std::convertible_to<int>;
  // Terms are summed in fours, each sum added to the accumulator.
  { F::kQuads } -> std::convertible_to<bool>;
  // The accumulator is the result itself: there are no scales.
  { F::kCarriesAccumulator } -> std::convertible_to<bool>;
  // Columns that are summed together for a bias; 0: there is none.
  { F::kSumStep } -> std::convertible_to<int>;
  { F::term(0) } -> std::same_as<Term>;
  { f.template decode<0>(words) } -> std::same_as<F16>;
  requires std::constructible_from<
      typename F::Scales,
      const glm_fused::cpu::DotArgs&,
      int>;
};

// The kernel of a family for a format and lane order; each header defines its
// own.
template <glm_fused::Family family>
const glm_fused::cpu::Kernel& find_kernel(
    const glm_fused::Format& format,
    bool fast);

// Fetches what will be read to a cache.
template <int level = 2>
GLM_INLINE void prefetch(const uint8_t* p, size_t bytes) {
  constexpr size_t kLine = 64;
  for (size_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(p + at, 0, 4 - level);
  }
}

template <int bytes>
struct LaneWords;

// The 32-bit words a lane's bytes are cut from; word w starts at byte kStart.
// `load_first` takes zeros for all but the first `count` bytes.
template <>
struct LaneWords<3> {
  static constexpr size_t kOverread = kThreesOverread;
  static constexpr int kStart[] = {0};
  U16 w[1];
  GLM_INLINE void load(const uint8_t* p) {
    w[0] = load_threes(p);
  }
#if defined(GLM_AVX512)
  GLM_INLINE void load_first(const uint8_t* p, size_t count) {
    w[0] = spread_threes(load_bytes(p, count));
  }
#endif
};
template <>
struct LaneWords<4> {
  static constexpr size_t kOverread = 0;
  static constexpr int kStart[] = {0};
  U16 w[1];
  GLM_INLINE void load(const uint8_t* p) {
    w[0] = load_words(p);
  }
#if defined(GLM_AVX512)
  GLM_INLINE void load_first(const uint8_t* p, size_t count) {
    w[0] = load_bytes(p, count);
  }
#endif
};
template <>
struct LaneWords<5> {
  static constexpr size_t kOverread = kFivesOverread;
  static constexpr int kStart[] = {0, 1};
  U16 w[2];
  GLM_INLINE void load(const uint8_t* p) {
    load_fives(p, w[0], w[1]);
  }
};
template <>
struct LaneWords<6> {
  static constexpr size_t kOverread = kSixesOverread;
  static constexpr int kStart[] = {0, 2};
  U16 w[2];
  GLM_INLINE void load(const uint8_t* p) {
    load_sixes(p, w[0], w[1]);
  }
};
template <>
struct LaneWords<8> {
  static constexpr size_t kOverread = 0;
  static constexpr int kStart[] = {0, 4};
  U16 w[2];
  GLM_INLINE void load(const uint8_t* p) {
    load_pairs(p, w[0], w[1]);
  }
};
template <>
struct LaneWords<10> {
  static constexpr size_t kOverread = kTensOverread;
  static constexpr int kStart[] = {0, 4, 6};
  U16 w[3];
  GLM_INLINE void load(const uint8_t* p) {
    load_tens(p, w[0], w[1], w[2]);
  }
};

// Loads a lane's words of which only the first `count` bytes are there.
template <size_t bytes, class Words>
GLM_INLINE void load_first(Words& words, const uint8_t* p, size_t count) {
  if constexpr (requires { words.load_first(p, count); }) {
    words.load_first(p, count);
  } else {
    alignas(64) uint8_t padded[bytes + Words::kOverread];
    copy_padded(padded, p, count < bytes ? count : bytes);
    words.load(padded);
  }
}

template <class Words>
constexpr int word_of(int byte) {
  int word = 0;
  while (byte >= Words::kStart[word] + 4) {
    word++;
  }
  return word;
}

// The floats of the lanes whose words they are.
template <class Words>
struct LanesOf {
  using type = F16;
};
#if defined(GLM_AVX2)
// The words of the first half of the lanes, or of the second.
template <class Words, int half>
struct HalfOf {
  static constexpr const auto& kStart = Words::kStart;
  U8 w[std::size(Words::kStart)];
  HalfOf() = default;
  GLM_INLINE explicit HalfOf(const Words& all) {
    unroll<std::size(Words::kStart)>(
        GLM_EACH(i) { w[i] = half == 0 ? all.w[i].a : all.w[i].b; });
  }
};
template <class Words, int half>
struct LanesOf<HalfOf<Words, half>> {
  using type = F8;
};
#endif

template <int byte, class Words>
GLM_INLINE auto from_byte(const Words& words) {
  constexpr int word = word_of<Words>(byte);
  return shift_right<8 * (byte - Words::kStart[word])>(words.w[word]);
}

}  // namespace
