#include <algorithm>

#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "reference/reference.h"
#include "rounding.h"
#include "view.h"

namespace glm_fused {

namespace cpu {

namespace {

// How values of an activation type are stored, and what rounds to them.
struct Singles {
  using Code = float;
  static float decode(float value) {
    return value;
  }
  static float encode(float value) {
    return value;
  }
};
struct Halves {
  using Code = uint16_t;
  static float decode(uint16_t code) {
    return from_float16(code);
  }
  static uint16_t encode(float value) {
    return to_float16(value);
  }
};
struct Brains {
  using Code = uint16_t;
  static float decode(uint16_t code) {
    return from_bfloat16(code);
  }
  static uint16_t encode(float value) {
    return to_bfloat16(value);
  }
};

class Rotation : public Staged {
 public:
  Rotation(
      const Arrays& in,
      mx::array& y,
      bool interleaved,
      bool reference,
      int workers)
      : x_(in[0]),
        cosines_(in[1]),
        sines_(in[2]),
        y_(y),
        interleaved_(interleaved),
        reference_(reference),
        workers_(workers),
        view_(view_of(in[0])),
        cosine_view_(view_of(in[1])),
        sine_view_(view_of(in[2])),
        rows_(static_cast<int>(y.size() / view_.columns)),
        tile_(std::max(1, kTileValues / view_.columns)) {}

  void run() {
    if (reference_) {
      reference::rotate(x_, cosines_, sines_, interleaved_, y_);
    } else {
      run_stages(workers_);
    }
  }

  int stages() const override {
    return 1;
  }

  Stage begin(int) override {
    const double work = kWorkPerValue * static_cast<double>(y_.size());
    return {(rows_ + tile_ - 1) / tile_, work};
  }

  void tile(int, int number, int) override {
    const int end = std::min((number + 1) * tile_, rows_);
    for (int row = number * tile_; row < end; row++) {
      rotate(row);
    }
  }

 private:
  static constexpr int kTileValues = 8192;
  // A value takes the time of so many multiply-adds of a dot product.
  static constexpr double kWorkPerValue = 8;

  void rotate(int row) const {
    if (x_.dtype() == mx::float32) {
      rotate_as<Singles>(row);
    } else if (x_.dtype() == mx::float16) {
      rotate_as<Halves>(row);
    } else {
      rotate_as<Brains>(row);
    }
  }

  template <class Type>
  void rotate_as(int row) const {
    using Code = typename Type::Code;
    const int n = view_.columns, pairs = cosine_view_.columns;
    const int64_t stride = view_.column_stride;
    // The heads of a position share its angles.
    const int length = view_.length;
    const int angle = row / length / view_.heads * length + row % length;
    const Code* x = x_.data<Code>() + row_offset(view_, row);
    Code* y = y_.data<Code>() + static_cast<int64_t>(row) * n;
    const float* cosine =
        cosines_.data<float>() + row_offset(cosine_view_, angle);
    const float* sine = sines_.data<float>() + row_offset(sine_view_, angle);
    for (int i = 0; i < pairs; i++) {
      const int first = interleaved_ ? 2 * i : i;
      const int second = interleaved_ ? 2 * i + 1 : pairs + i;
      const float a = Type::decode(x[first * stride]);
      const float b = Type::decode(x[second * stride]);
      const float c = cosine[i * cosine_view_.column_stride];
      const float s = sine[i * sine_view_.column_stride];
      y[first] = Type::encode(a * c - b * s);
      y[second] = Type::encode(b * c + a * s);
    }
    for (int i = 2 * pairs; i < n; i++) {
      y[i] = x[i * stride];
    }
  }

  const mx::array &x_, &cosines_, &sines_;
  mx::array& y_;
  const bool interleaved_, reference_;
  const int workers_;
  const ViewParams view_, cosine_view_, sine_view_;
  const int rows_, tile_;
};

}  // namespace

}  // namespace cpu

void Rotate::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto make = [&](auto& in, auto& out, cpu::Scratch&, int workers) {
    return cpu::Rotation(in, out[0], interleaved_, reference_, workers);
  };
  cpu::dispatch(*this, inputs, outputs, make, reference_);
}

}  // namespace glm_fused
