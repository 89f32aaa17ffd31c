// Scales and biases of MLX's affine formats, as their dot products use them.
#pragma once

#include "cpu/dot/group_scales.h"

namespace {

// result += fma(scale, accum, sum * bias), as `scale * accum + sum * bias`
// contracts; the lane sums of x follow its planes.
template <int values>
class AffineScales {
 public:
  GLM_INLINE AffineScales(const DotArgs& a, int)
      : scales_(a.planes[1]),
        biases_(a.planes[2]),
        type_(a.format.float_type),
        spread_(
            a,
            values,
            type_ == FloatType::float32 ? 4 : 2,
            type_ == FloatType::bfloat16 ? 2 : 0) {}

  template <int R>
  GLM_INLINE void locate(TileRows& rows, int row, int stride) const {
    const size_t at = static_cast<size_t>(row) * spread_.row_bytes();
    rows.scales = scales_ + at;
    rows.biases = biases_ + at;
    rows.scale_stride = static_cast<ptrdiff_t>(stride) * spread_.row_bytes();
    rows.direct_halves = type_ == FloatType::float32
        ? 0
        : std::min(
              rows.direct_halves,
              spread_.direct_halves(at + (R - 1) * rows.scale_stride));
  }

  GLM_INLINE void prefetch(const uint8_t* const* planes, int row, int count)
      const {
    spread_.prefetch(planes[1], row, count);
    spread_.prefetch(planes[2], row, count);
  }

  template <class Do>
  GLM_INLINE void with_reading(const Do& with) const {
    constexpr int kOne = 2, kMost = values;  // 16 * values / 32 groups
    const int bytes = spread_.half_bytes();
    if (type_ == FloatType::float16) {
      with(InPlace<kMost, FloatType::float16>());
    } else if (bytes == kOne && values <= 8) {
      with(InPlace<kOne>());
    } else if (kMost <= 8 || bytes <= 8) {
      with(InPlace<8>());
    } else if constexpr (kMost > 8) {
      with(InPlace<kMost>());
    }
  }

  template <class Reading, int R, int M>
  GLM_INLINE void finish(
      const TileRows& rows,
      int hb,
      const float* sums,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    with_groups<Reading, R>(
        rows, hb, [&](auto r, F16 s, F16 b) GLM_ALWAYS_INLINE {
          add_group(s, b, sums, acc[r], result[r]);
        });
  }

  // The scales and biases of a half-block of R rows, to be met many times.
  template <int R>
  struct Groups {
    F16 scales[R], biases[R];

    template <int M>
    GLM_INLINE void finish(
        const float* sums,
        const F16 (&acc)[R][M],
        F16 (&result)[R][M]) const {
      unroll<R>(GLM_EACH(r) {
        add_group(scales[r], biases[r], sums, acc[r], result[r]);
      });
    }
  };
  template <class Reading, int R>
  GLM_INLINE void read(const TileRows& rows, int hb, Groups<R>& to) const {
    with_groups<Reading, R>(
        rows, hb, [&](auto r, F16 s, F16 b) GLM_ALWAYS_INLINE {
          to.scales[r] = s;
          to.biases[r] = b;
        });
  }

  static GLM_INLINE float total(float sum) {
    return sum;
  }

 private:
  template <FloatType type>
  static GLM_INLINE F16 decode(U16 spread) {
    if constexpr (type == FloatType::float16) {
      return half_to_float(spread);
    } else {
      return as_float(spread);
    }
  }

  // Calls use(r, scale, bias) for each of R rows, in a half-block.
  template <class Reading, int R, class Use>
  GLM_INLINE void with_groups(const TileRows& rows, int hb, const Use& use)
      const {
    if constexpr (Reading::kInPlace) {
      const uint8_t* s = spread_.place(rows.scales, hb);
      const uint8_t* b = spread_.place(rows.biases, hb);
      return each_row<R>(
          s, b, rows.scale_stride, use, GLM_EACH(p) {
            if constexpr (Reading::kBytes == 2) {
              return as_float(shift_left<16>(splat_word(p)));
            } else {
              return decode<Reading::kType>(
                  spread_.template whole<Reading::kBytes>(p));
            }
          });
    }
    if (type_ == FloatType::float32) {
      return each_row<R>(
          rows.scales, rows.biases, rows.scale_stride, use, GLM_EACH(row) {
            return spread_.floats(row, hb);
          });
    }
    const bool direct = hb < rows.direct_halves;
    uint8_t edges[2][R][16];
    ptrdiff_t stride = rows.scale_stride, same = stride;
    const uint8_t* s =
        spread_.locate(rows.scales, hb, direct, edges[0], stride);
    const uint8_t* b = spread_.locate(rows.biases, hb, direct, edges[1], same);
    const Shuffle& spread = spread_.at(hb);
    if (type_ == FloatType::bfloat16) {
      return each_row<R>(
          s, b, stride, use, GLM_EACH(p) {
            return decode<FloatType::bfloat16>(spread(p));
          });
    }
    each_row<R>(
        s, b, stride, use, GLM_EACH(p) { return half_to_float(spread(p)); });
  }

  template <int R, class Use, class Read>
  static GLM_INLINE void each_row(
      const uint8_t* scales,
      const uint8_t* biases,
      ptrdiff_t stride,
      const Use& use,
      const Read& read) {
    unroll<R>(GLM_EACH(r) {
      use(r, read(scales + r * stride), read(biases + r * stride));
    });
  }

  template <int M>
  static GLM_INLINE void add_group(
      F16 scale,
      F16 bias,
      const float* sums,
      const F16 (&acc)[M],
      F16 (&result)[M]) {
    unroll<M>(GLM_EACH(m) {
      const F16 offset = mul(load(sums + m * kHalf), bias);
      result[m] = add(result[m], fma(scale, acc[m], offset));
    });
  }

  const uint8_t* scales_;
  const uint8_t* biases_;
  const FloatType type_;
  const Spread spread_;
};

}  // namespace
