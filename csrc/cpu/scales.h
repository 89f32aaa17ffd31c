// Group scales, spread over the lanes that use them.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace {

using glm_fused::FloatType;
using glm_fused::cpu::DotArgs;

// Where R rows of a tile start.
template <int R>
struct Rows {
  const uint8_t* weight[R];
  const uint8_t* scales[R];
  const uint8_t* biases[R];
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

  GLM_INLINE int first(int half_block) const {
    return half_block * kHalf >> log2_lanes_;
  }
  // The half-block's groups: fewer than usual where the row ends in it.
  GLM_INLINE int count(int half_block) const {
    const int whole = (kHalf + (1 << log2_lanes_) - 1) >> log2_lanes_;
    const int left = groups_ - first(half_block);
    return left < whole ? left : whole;
  }
  // Whether 16 bytes can be read at the half-block's first group of a row
  // `offset` bytes into the tile, all of the lanes inside it.
  GLM_INLINE bool direct(int half_block, size_t offset) const {
    return (half_block + 1) * kHalf <= groups_ << log2_lanes_ &&
        offset + first(half_block) * size_ + 16 <= tile_bytes_;
  }
  GLM_INLINE U16 operator()(const uint8_t* row, int hb, bool direct) const {
    const uint8_t* p = row + first(hb) * size_;
    if (__builtin_expect(direct, 1)) {
      return shuffle_(p);
    }
    uint8_t edge[16] = {};
    memcpy(edge, p, count(hb) * size_);
    return shuffle_(edge);
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
  GLM_INLINE void locate(Rows<R>& rows, int r, int row) const {
    const size_t at = static_cast<size_t>(row) * spread_.row_bytes();
    rows.scales[r] = scales_ + at;
    rows.biases[r] = biases_ + at;
  }

  template <int R, int M>
  GLM_INLINE void finish(
      const Rows<R>& rows,
      int hb,
      const float* sums,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    if (__builtin_expect(type_ == FloatType::float32, 0)) {
      const auto read = [&](const uint8_t* row) __attribute__((always_inline)) {
        return spread_.floats(row, hb);
      };
      return add_groups(rows, sums, acc, result, read);
    }
    const bool direct = spread_.direct(hb, rows.scales[R - 1] - scales_);
    if (type_ == FloatType::bfloat16) {
      const auto read = [&](const uint8_t* row) __attribute__((always_inline)) {
        return as_float(spread_(row, hb, direct));
      };
      return add_groups(rows, sums, acc, result, read);
    }
    const auto read = [&](const uint8_t* row) __attribute__((always_inline)) {
      return half_to_float(spread_(row, hb, direct));
    };
    add_groups(rows, sums, acc, result, read);
  }

 private:
  template <int R, int M, class Read>
  static GLM_INLINE void add_groups(
      const Rows<R>& rows,
      const float* sums,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M],
      Read read) {
    unroll<R>(GLM_EACH(r) {
      const F16 s = read(rows.scales[r]), b = read(rows.biases[r]);
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
  GLM_INLINE void locate(Rows<R>& rows, int r, int row) const {
    rows.scales[r] = scales_ + static_cast<size_t>(row) * spread_.row_bytes();
  }

  template <int R, int M>
  GLM_INLINE void finish(
      const Rows<R>& rows,
      int hb,
      const float*,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    const bool direct = spread_.direct(hb, rows.scales[R - 1] - scales_);
    unroll<R>(GLM_EACH(r) {
      const F16 s = Code::decode(spread_(rows.scales[r], hb, direct));
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
  GLM_INLINE void locate(Rows<R>&, int, int) const {}

  template <int R, int M>
  GLM_INLINE void finish(
      const Rows<R>&,
      int,
      const float*,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    unroll<R>(
        GLM_EACH(r) { unroll<M>(GLM_EACH(m) { result[r][m] = acc[r][m]; }); });
  }
};

}  // namespace
