// Group scales, spread over the lanes that use them.
#pragma once

#include <cstring>

#include "cpu/dot/dot_kernels.h"
#include "cpu/runtime/simd.h"

namespace {

using glm_fused::FloatType;
using glm_fused::cpu::DotArgs;

// R rows of a tile: row r lies r strides behind the first.
struct Rows {
  const uint8_t* weight;
  const uint8_t* scales;
  const uint8_t* biases;
  ptrdiff_t weight_stride;
  ptrdiff_t scale_stride;
  int direct_halves;  // the first half-blocks, whose scales are read in place
};

// Spreads the group values of a half-block, `size` bytes each and at most 16
// bytes together, over its lanes: value of group g to byte `at` of the lanes
// that belong to g.
class Spread {
 public:
  GLM_INLINE Spread(const DotArgs& a, int values, int size, int at)
      : log2_lanes_(__builtin_ctz(a.format.group_size / values)),
        size_(size),
        groups_(a.k / a.format.group_size),
        row_bytes_(groups_ * size),
        tile_bytes_(static_cast<size_t>(row_bytes_) * a.rows),
        shuffle_(control(log2_lanes_, size, at).bytes) {}

  // The half-blocks for which 16 bytes can be read at the first group of a row
  // `offset` bytes into the tile, and whose lanes all lie inside the row.
  GLM_INLINE int direct_halves(size_t offset) const {
    const ptrdiff_t left = tile_bytes_ - offset - 16;
    const ptrdiff_t readable =
        left < 0 ? 0 : ((left / size_ + 1) << log2_lanes_) + kHalf - 1;
    const int whole = (groups_ << log2_lanes_) / kHalf;
    return readable / kHalf < whole ? static_cast<int>(readable / kHalf)
                                    : whole;
  }
  // The group values of a half-block of R rows: in place, or copied where
  // they end short of 16 bytes. `stride` changes with it.
  template <int R>
  GLM_INLINE const uint8_t* locate(
      const uint8_t* row,
      int hb,
      bool direct,
      uint8_t (&edge)[R][16],
      ptrdiff_t& stride) const {
    const uint8_t* at = row + first(hb) * size_;
    if (__builtin_expect(direct, 1)) {
      return at;
    }
    memset(edge, 0, sizeof(edge));
    for (int r = 0; r < R; r++) {
      memcpy(edge[r], at + r * stride, count(hb) * size_);
    }
    stride = 16;
    return edge[0];
  }
  GLM_INLINE U16 operator()(const uint8_t* values) const {
    return shuffle_(values);
  }
  // fp32 values do not fit 16 bytes: lane by lane.
  GLM_INLINE F16 floats(const uint8_t* row, int hb) const {
    const uint8_t* p = row + first(hb) * 4;
    const int n = count(hb);
    float lanes[kHalf] = {};
    for (int lane = 0; lane >> log2_lanes_ < n && lane < kHalf; lane++) {
      memcpy(&lanes[lane], p + 4 * (lane >> log2_lanes_), 4);
    }
    return load(lanes);
  }
  GLM_INLINE int row_bytes() const {
    return row_bytes_;
  }

 private:
  GLM_INLINE int first(int half_block) const {
    return half_block * kHalf >> log2_lanes_;
  }
  // The half-block's groups: fewer than usual where the row ends in it.
  GLM_INLINE int count(int half_block) const {
    const int whole = (kHalf + (1 << log2_lanes_) - 1) >> log2_lanes_;
    const int left = groups_ - first(half_block);
    return left < whole ? left : whole;
  }
  struct Control {
    uint8_t bytes[4 * kHalf];
  };
  static GLM_INLINE Control control(int log2_lanes, int size, int at) {
    Control c;
    memset(c.bytes, 0x80, sizeof(c.bytes));
    for (int lane = 0; lane < kHalf && size <= 2; lane++) {
      for (int i = 0; i < size; i++) {
        c.bytes[4 * lane + at + i] =
            static_cast<uint8_t>((lane >> log2_lanes) * size + i);
      }
    }
    return c;
  }

  const int log2_lanes_, size_, groups_, row_bytes_;
  const size_t tile_bytes_;
  const Shuffle shuffle_;
};

// result += fma(scale, accum, sum * bias), as `scale * accum + sum * bias`
// contracts; the lane sums of x follow its planes.
class AffineScales {
 public:
  GLM_INLINE AffineScales(const DotArgs& a, int values)
      : scales_(a.scales),
        biases_(a.biases),
        type_(a.format.float_type),
        spread_(
            a,
            values,
            type_ == FloatType::float32 ? 4 : 2,
            type_ == FloatType::bfloat16 ? 2 : 0) {}

  template <int R>
  GLM_INLINE void locate(Rows& rows, int row, int stride) const {
    const size_t at = static_cast<size_t>(row) * spread_.row_bytes();
    rows.scales = scales_ + at;
    rows.biases = biases_ + at;
    rows.scale_stride = static_cast<ptrdiff_t>(stride) * spread_.row_bytes();
    rows.direct_halves =
        spread_.direct_halves(at + (R - 1) * rows.scale_stride);
  }

  template <int R, int M>
  GLM_INLINE void finish(
      const Rows& rows,
      int hb,
      const float* sums,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    if (__builtin_expect(type_ == FloatType::float32, 0)) {
      const auto read = GLM_EACH(row) {
        return spread_.floats(row, hb);
      };
      return add_groups(
          rows.scales, rows.biases, rows.scale_stride, sums, acc, result, read);
    }
    const bool direct = hb < rows.direct_halves;
    uint8_t edges[2][R][16];
    ptrdiff_t stride = rows.scale_stride, same = stride;
    const uint8_t* s =
        spread_.locate(rows.scales, hb, direct, edges[0], stride);
    const uint8_t* b = spread_.locate(rows.biases, hb, direct, edges[1], same);
    if (type_ == FloatType::bfloat16) {
      const auto read = GLM_EACH(p) {
        return as_float(spread_(p));
      };
      return add_groups(s, b, stride, sums, acc, result, read);
    }
    const auto read = GLM_EACH(p) {
      return half_to_float(spread_(p));
    };
    add_groups(s, b, stride, sums, acc, result, read);
  }

 private:
  template <int R, int M, class Read>
  static GLM_INLINE void add_groups(
      const uint8_t* scales,
      const uint8_t* biases,
      ptrdiff_t stride,
      const float* sums,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M],
      Read read) {
    unroll<R>(GLM_EACH(r) {
      const F16 s = read(scales + r * stride), b = read(biases + r * stride);
      unroll<M>(GLM_EACH(m) {
        const F16 offset = mul(load(sums + m * kHalf), b);
        result[r][m] = add(result[r][m], fma(s, acc[r][m], offset));
      });
    });
  }

  const uint8_t* scales_;
  const uint8_t* biases_;
  const FloatType type_;
  const Spread spread_;
};

// 2^(code - 127); 2^-127 is subnormal and written as such.
struct E8M0 {
  static constexpr int kByte = 3;
  static GLM_INLINE F16 decode(U16 v) {
    return as_float(max_words(shift_right<1>(v), 0x400000u));
  }
};
struct E4M3 {
  static constexpr int kByte = 0;
  static GLM_INLINE F16 decode(U16 v) {
    return e4m3_to_float(v);
  }
};

// result += scale * accum, two roundings: MLX multiplies inside qdot.
template <class Code>
class ByteScales {
 public:
  GLM_INLINE ByteScales(const DotArgs& a, int values)
      : scales_(a.scales), spread_(a, values, 1, Code::kByte) {}

  template <int R>
  GLM_INLINE void locate(Rows& rows, int row, int stride) const {
    const size_t at = static_cast<size_t>(row) * spread_.row_bytes();
    rows.scales = scales_ + at;
    rows.scale_stride = static_cast<ptrdiff_t>(stride) * spread_.row_bytes();
    rows.direct_halves =
        spread_.direct_halves(at + (R - 1) * rows.scale_stride);
  }

  template <int R, int M>
  GLM_INLINE void finish(
      const Rows& rows,
      int hb,
      const float*,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    uint8_t edge[R][16];
    ptrdiff_t stride = rows.scale_stride;
    const uint8_t* at =
        spread_.locate(rows.scales, hb, hb < rows.direct_halves, edge, stride);
    unroll<R>(GLM_EACH(r) {
      const F16 s = Code::decode(spread_(at + r * stride));
      unroll<M>(
          GLM_EACH(m) { result[r][m] = add(result[r][m], mul(s, acc[r][m])); });
    });
  }

 private:
  const uint8_t* scales_;
  const Spread spread_;
};
using E8M0Scales = ByteScales<E8M0>;
using E4M3Scales = ByteScales<E4M3>;

struct NoScales {
  GLM_INLINE NoScales(const DotArgs&, int) {}

  template <int R>
  GLM_INLINE void locate(Rows&, int, int) const {}

  template <int R, int M>
  GLM_INLINE void finish(
      const Rows&,
      int,
      const float*,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    unroll<R>(
        GLM_EACH(r) { unroll<M>(GLM_EACH(m) { result[r][m] = acc[r][m]; }); });
  }
};

}  // namespace
