// Packs rows of values (row_layout.h).
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/runtime/staged.h"
#include "ops.h"
#include "packing.h"
#include "row_layout.h"
#include "view.h"

namespace glm_fused::cpu {

// Packs values [b, 1, l, rank] and, if the layout has any, RoPE values [b, 1,
// l, rope] to rows of bytes [b, 1, l, …].
class PackRows : public Staged {
 public:
  PackRows(
      const RowLayout& layout,
      const std::vector<mx::array>& in,
      mx::array& out,
      int workers)
      : layout_(layout),
        values_(in[0]),
        ropes_(in.back()),
        out_(out),
        workers_(workers),
        rows_(static_cast<int>(values_.size() / layout.rank)),
        value_view_(view_of(values_)),
        rope_view_(view_of(ropes_)),
        out_view_(view_of(out)) {}

  void run() {
    run_stages(workers_);
  }

  int stages() const override {
    return 1;
  }

  Stage begin(int) override {
    const double work = kWorkPerValue * static_cast<double>(values_.size());
    return {(rows_ + kTile - 1) / kTile, work};
  }

  void tile(int, int number, int) override {
    const int end = std::min((number + 1) * kTile, rows_);
    for (int row = number * kTile; row < end; row++) {
      if (layout_.format == RowFormat::fp8) {
        pack<Fp8Packing>(row, kScaleTile);
      } else {
        pack<Int8Packing>(row, layout_.rank);
      }
    }
  }

 private:
  static constexpr int kTile = 16;  // rows that one thread takes
  // A value takes the time of so many multiply-adds of a dot product.
  static constexpr double kWorkPerValue = 16;

  template <class Packing>
  void pack(int row, int tile) const {
    const int64_t stride = out_view_.column_stride;
    uint8_t* codes = out_.data<uint8_t>() + row_offset(out_view_, row);
    uint8_t* scales = codes + layout_.rank * stride;
    uint8_t* ropes =
        scales + 4 * scale_count(layout_.format, layout_.rank) * stride;
    const int64_t first = row_offset(value_view_, row);
    for (int begin = 0; begin < layout_.rank; begin += tile) {
      const int end = std::min(begin + tile, layout_.rank);
      const auto value = [&](int i) {
        return value_of(values_, first + i * value_view_.column_stride);
      };
      uint32_t largest = 0;  // among magnitudes bits are ordered as they are
      for (int i = begin; i < end; i++) {
        largest = std::max(largest, bits_of(value(i)) & 0x7fffffffu);
      }
      const float scale = float_of(largest) / Packing::most();
      const float divisor = scale == 0 ? 1 : scale;
      for (int i = begin; i < end; i++) {
        codes[i * stride] = Packing::code(value(i) / divisor);
      }
      store(scales, stride, bits_of(scale), 4);
      scales += 4 * stride;
    }
    for (int i = 0; i < layout_.rope; i++) {
      const int64_t at =
          row_offset(rope_view_, row) + i * rope_view_.column_stride;
      const uint16_t code = to_bfloat16(value_of(ropes_, at));
      store(ropes + 2 * i * stride, stride, code, 2);
    }
  }

  // Stores the low bytes of a number, one by one: rows may begin anywhere.
  static void store(uint8_t* to, int64_t stride, uint32_t number, int count) {
    for (int i = 0; i < count; i++) {
      to[i * stride] = static_cast<uint8_t>(number >> 8 * i);
    }
  }

  static float value_of(const mx::array& a, int64_t at) {
    if (a.dtype() == mx::float32) {
      return a.data<float>()[at];
    }
    const uint16_t code = a.data<uint16_t>()[at];
    return a.dtype() == mx::float16 ? from_float16(code) : from_bfloat16(code);
  }

  const RowLayout layout_;
  const mx::array &values_, &ropes_;
  mx::array& out_;
  const int workers_, rows_;
  const ViewParams value_view_, rope_view_, out_view_;
};

}  // namespace glm_fused::cpu
