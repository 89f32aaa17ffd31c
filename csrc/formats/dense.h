// Floats, in the order of MLX's gemv: four columns a lane, one running sum.
// Planes: weight.
#pragma once

#include "formats/decode.h"

namespace glm_fused {

class DenseRow {
 public:
  DenseRow(const Format& format, const uint8_t* const* planes)
      : type_(format.float_type), weight_(planes[0]) {}

  static int values(const Format&, bool) {
    return 4;
  }
  static std::string shader(const Format&, const std::string& floats, bool) {
    return "Dense<" + floats + ">";
  }

  void add(const float* x, int column, int values, float& result) const {
    for (int v = 0; v < values; v++) {
      result = std::fma(read_float(weight_, column + v, type_), x[v], result);
    }
  }

  static float total(float sum) {
    return sum;
  }

  void embedded(int column, int count, float* to) const {
    for (int i = 0; i < count; i++) {
      to[i] = read_float(weight_, column + i, type_);
    }
  }

 private:
  FloatType type_;
  const uint8_t* weight_;
};

template <>
struct RowOf<Family::dense> {
  using type = DenseRow;
};

}  // namespace glm_fused

#if defined(GLM_DOT_KERNELS)
#include "cpu/dot/dot_body.h"
#include "cpu/dot/group_scales.h"

namespace {

template <FloatType type>
struct DenseWords : LaneWords<8> {};
template <>
struct DenseWords<FloatType::float32> {
  static constexpr size_t kOverread = 0;
  F16 v[4];
  GLM_INLINE void load(const uint8_t* p) {
    load_quads(p, v);
  }
};

struct NoScales {
  GLM_INLINE NoScales(const DotArgs&, int) {}

  template <int R>
  GLM_INLINE void locate(TileRows&, int, int) const {}

  GLM_INLINE void prefetch(const uint8_t* const*, int, int) const {}

  template <class Do>
  GLM_INLINE void with_reading(const Do& with) const {
    with(InPlace<0>());
  }

  template <class Reading, int R, int M>
  GLM_INLINE void finish(
      const TileRows&,
      int,
      const float*,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    unroll<R>(
        GLM_EACH(r) { unroll<M>(GLM_EACH(m) { result[r][m] = acc[r][m]; }); });
  }

  static GLM_INLINE float total(float sum) {
    return sum;
  }
};

template <FloatType type>
struct Dense {
  static constexpr int kValues = 4;
  static constexpr int kBytes = type == FloatType::float32 ? 16 : 8;
  static constexpr size_t kHalfBytes = kHalf * kBytes;
  static constexpr int kTerms = 4;
  static constexpr bool kQuads = false;
  static constexpr bool kCarriesAccumulator = true;
  static constexpr int kSumStep = 0;
  using Words = DenseWords<type>;
  using Scales = NoScales;

  static constexpr Term term(int p) {
    return {p, 0, 0, 1.0f, 1.0f};
  }
  template <int p>
  GLM_INLINE F16 decode(const Words& words) const {
    if constexpr (type == FloatType::float32) {
      return words.v[p];
    } else if constexpr (type == FloatType::float16) {
      return half_to_float(shift_right<16 * (p % 2)>(words.w[p / 2]));
    } else if constexpr (p % 2 == 0) {
      return as_float(shift_left<16>(words.w[p / 2]));
    } else {
      return as_float(bits_and(words.w[p / 2], 0xffff0000u));
    }
  }
};

template <>
const Kernel& find_kernel<glm_fused::Family::dense>(
    const glm_fused::Format& format,
    bool) {
  using enum FloatType;
  return format.float_type == float32 ? kernel<Dense<float32>>
      : format.float_type == float16  ? kernel<Dense<float16>>
                                      : kernel<Dense<bfloat16>>;
}

}  // namespace
#endif
