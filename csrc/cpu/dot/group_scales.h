// Group scales, spread over the lanes that use them.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/dot/lanes.h"

namespace {

using glm_fused::FloatType;
using glm_fused::cpu::DotArgs;

// How a half-block is read. InPlace: one of TileRows::direct_halves, of which a
// row has `bytes` of scales or less. Anywhere: any, such as the part of one
// that ends a row.
template <int bytes, FloatType type = FloatType::bfloat16>
struct InPlace {
  static constexpr bool kInPlace = true;
  static constexpr int kBytes = bytes;
  static constexpr FloatType kType = type;
};
struct Anywhere {
  static constexpr bool kInPlace = false;
};
// Either of them, which each half-block is looked at for: where that is little
// beside its products, so that these are compiled once.
struct Either : Anywhere {};

// R rows of a tile: row r lies r strides behind the first.
struct TileRows {
  const uint8_t* weight;
  const uint8_t* scales;
  const uint8_t* biases;
  ptrdiff_t weight_stride;
  ptrdiff_t scale_stride;
  // The first half-blocks, which are whole: with what loads read past them they
  // lie within the matrix, and of those of direct_halves, so do their scales.
  int whole_halves;
  int direct_halves;
  int same_scales;  // the first rows, which share scales where several do
};

// Spreads the group values of a half-block, `size` bytes each and at most 16
// bytes together, over its lanes: value of group g to byte `at` of the lanes
// that belong to g.
class Spread {
 public:
  GLM_INLINE Spread(const DotArgs& a, int values, int size, int at)
      : log2_lanes_(__builtin_ctz(a.format.spec->block / values)),
        size_(size),
        log2_size_(__builtin_ctz(size)),
        groups_(a.k / a.format.spec->block),
        row_bytes_(groups_ * size),
        lanes_(groups_ << log2_lanes_),
        bytes_(static_cast<size_t>(row_bytes_) * a.rows_left),
        control_(control(log2_lanes_, size, at)),
        shuffle_(control_),
        tail_(lanes_ % kHalf == 0 ? shuffle_ : tail(lanes_ % kHalf)) {}

  // The half-blocks for which 16 bytes can be read at the first group of a row
  // `offset` bytes from the tile's first.
  GLM_INLINE int direct_halves(size_t offset) const {
    const ptrdiff_t left = bytes_ - offset - 16;
    const ptrdiff_t readable =
        left < 0 ? 0 : (((left >> log2_size_) + 1) << log2_lanes_) + kHalf - 1;
    return static_cast<int>(std::min<ptrdiff_t>(readable, lanes_) / kHalf);
  }
  // Where the group values of a half-block lie.
  GLM_INLINE const uint8_t* place(const uint8_t* row, int hb) const {
    return row + first(hb) * size_;
  }
  // The same of R rows, or a copy where they end short of 16 bytes. `stride`
  // changes with it.
  template <int R>
  GLM_INLINE const uint8_t* locate(
      const uint8_t* row,
      int hb,
      bool direct,
      uint8_t (&edge)[R][16],
      ptrdiff_t& stride) const {
    const uint8_t* at = place(row, hb);
    if (direct) {
      return at;
    }
    for (int r = 0; r < R; r++) {
      copy_padded(edge[r], at + r * stride, count(hb) * size_);
    }
    stride = 16;
    return edge[0];
  }
  // The values of a whole half-block, `bytes` or less, over its lanes.
  template <int bytes>
  GLM_INLINE U16 whole(const uint8_t* p) const {
    return bytes <= 8 ? shuffle_.first_eight(p) : shuffle_(p);
  }
  // Spreads the values of any; lanes past the end of a row get zeros.
  GLM_INLINE const Shuffle& at(int hb) const {
    return hb < lanes_ / kHalf ? shuffle_ : tail_;
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
  // Fetches those of `count` rows from `row` on.
  GLM_INLINE void prefetch(const uint8_t* plane, int row, int count) const {
    const auto bytes = static_cast<ptrdiff_t>(row_bytes_);
    ::prefetch(plane + row * bytes, count * bytes);
  }
  GLM_INLINE int row_bytes() const {
    return row_bytes_;
  }
  // In a whole half-block.
  GLM_INLINE int half_bytes() const {
    return std::max(kHalf >> log2_lanes_, 1) * size_;
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
  static constexpr Control make_control(int log2_lanes, int size, int at) {
    Control c{};
    for (uint8_t& byte : c.bytes) {
      byte = 0x80;
    }
    for (int lane = 0; lane < kHalf; lane++) {
      for (int i = 0; i < size; i++) {
        c.bytes[4 * lane + at + i] =
            static_cast<uint8_t>((lane >> log2_lanes) * size + i);
      }
    }
    return c;
  }
  // Of values that do not fit 16 bytes it is not used.
  static GLM_INLINE const uint8_t* control(int log2_lanes, int size, int at) {
    struct Controls {
      Control of[kLogs][2][4];
    };
    static constexpr Controls controls = [] {
      Controls c{};
      for (int log2 = 0; log2 < kLogs; log2++) {
        for (int size = 1; size <= 2; size++) {
          for (int at = 0; at + size <= 4; at++) {
            c.of[log2][size - 1][at] = make_control(log2, size, at);
          }
        }
      }
      return c;
    }();
    const int log2 = log2_lanes < kLogs ? log2_lanes : kLogs - 1;
    return controls.of[log2][size == 1 ? 0 : 1][at].bytes;
  }
  // The same, of which only the first lanes take part.
  GLM_INLINE Shuffle tail(int lanes) const {
    Control c;
    memset(c.bytes, 0x80, sizeof(c.bytes));
    memcpy(c.bytes, control_, 4 * lanes);
    return Shuffle(c.bytes);
  }
  static constexpr int kLogs = 5;  // from there on, all lanes share a group

  const int log2_lanes_, size_, log2_size_, groups_, row_bytes_, lanes_;
  const size_t bytes_;  // from the tile's first row to the matrix's last
  const uint8_t* const control_;
  const Shuffle shuffle_, tail_;
};

}  // namespace
