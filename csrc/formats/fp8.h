// The FP8 of released checkpoints: e4m3 codes with one scale for a square of
// 128 rows and 128 columns. Planes: weight, scales. MLX has no such format; the
// lanes own what they own in mxfp8, and a group's sum is multiplied by its
// scale and added to the result in one rounding.
#pragma once

#include "formats/fp.h"

namespace glm_fused {

class Fp8Row {
 public:
  Fp8Row(const Format& format, const uint8_t* const* planes)
      : format_(format), weight_(planes[0]), scales_(planes[1]) {}

  static int values(const Format&, bool) {
    return 8;
  }
  static std::string
  shader(const Format&, const std::string& floats, bool whole_tiles) {
    return "Fp8<" + floats + (whole_tiles ? ", true>" : ", false>");
  }

  void add(const float* x, int column, int values, float& result) const {
    float accum = 0;
    for (int v = 0; v < values; v++) {
      accum = std::fma(x[v], FpRow::e4m3(weight_[column + v]), accum);
    }
    const int group = column / format_.spec->block;
    const float scale = read_float(scales_, group, format_.float_type);
    result = std::fma(scale, accum, result);
  }

  static float total(float sum) {
    return sum;
  }

 private:
  const Format& format_;
  const uint8_t* weight_;
  const uint8_t* scales_;
};

template <>
struct RowOf<Family::fp8> {
  using type = Fp8Row;
};

}  // namespace glm_fused

#if defined(GLM_DOT_KERNELS)

namespace {

// result = fma(scale, accum, result), where all lanes of half a block of 256
// columns have the same scale.
class SquareScales {
 public:
  GLM_INLINE SquareScales(const DotArgs& a, int)
      : scales_(a.planes[1]),
        type_(a.format.float_type),
        rows_(a.format.spec->planes[1].rows),
        first_row_(a.row % rows_),
        row_bytes_(static_cast<int>(a.format.row_bytes(1, a.k))) {}

  template <int R>
  GLM_INLINE void locate(TileRows& rows, int row, int stride) const {
    const int at = first_row_ + row;
    rows.scales = scales_ + static_cast<ptrdiff_t>(at / rows_) * row_bytes_;
    // R rows are fewer than a square has, so they meet two squares at most.
    rows.same_scales = stride == 0 ? R : rows_ - at % rows_;
  }

  GLM_INLINE void prefetch(const uint8_t* const*, int, int) const {}

  template <class Do>
  GLM_INLINE void with_reading(const Do& with) const {
    with(InPlace<0>());
  }

  template <class Reading, int R, int M>
  GLM_INLINE void finish(
      const TileRows& rows,
      int hb,
      const float*,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    unroll<R>(GLM_EACH(r) {
      const uint8_t* row =
          rows.scales + (r < rows.same_scales ? 0 : row_bytes_);
      const F16 scale = splat(glm_fused::read_float(row, hb, type_));
      unroll<M>(
          GLM_EACH(m) { result[r][m] = fma(scale, acc[r][m], result[r][m]); });
    });
  }

  static GLM_INLINE float total(float sum) {
    return sum;
  }

 private:
  const uint8_t* scales_;
  const FloatType type_;
  const int rows_, first_row_, row_bytes_;
};

struct SquaredFp8 : Fp8<true> {
  using Scales = SquareScales;
};

template <>
const Kernel& find_kernel<glm_fused::Family::fp8>(
    const glm_fused::Format&,
    bool) {
  return kernel<SquaredFp8>;
}

}  // namespace
#endif
