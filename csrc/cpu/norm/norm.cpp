#include <algorithm>

#include "cpu/norm/norm_kernels.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "reference/reference.h"
#include "view.h"

namespace glm_fused {

namespace cpu {

namespace {

// RMSNorm of x's rows, or LayerNorm where there is a bias.
class Norm : public Staged {
 public:
  Norm(
      const Arrays& in,
      mx::array& y,
      float eps,
      bool reference,
      Scratch& scratch,
      int workers)
      : x_(in[0]),
        weight_(in[1]),
        bias_(in.size() > 2 ? &in[2] : nullptr),
        y_(y),
        eps_(eps),
        reference_(reference),
        workers_(workers),
        view_(view_of(in[0])),
        rows_(static_cast<int>(y.size() / view_.columns)),
        tile_(std::max(1, kTileValues / view_.columns)),
        kernel_(norm_kernel()),
        spare_(scratch.take_each<float>(workers, norm_spare(view_.columns))) {}

  void run() {
    if (reference_) {
      reference::norm(x_, weight_, bias_, eps_, y_);
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

  void tile(int, int number, int worker) override {
    const int end = std::min((number + 1) * tile_, rows_);
    for (int row = number * tile_; row < end; row++) {
      norm(row, spare_[worker]);
    }
  }

 private:
  static constexpr int kTileValues = 8192;
  // A value takes the time of so many multiply-adds of a dot product.
  static constexpr double kWorkPerValue = 4;

  void norm(int row, float* spare) const {
    const auto item = static_cast<int64_t>(x_.itemsize());
    const int64_t out = static_cast<int64_t>(row) * view_.columns;
    kernel_({
        x_.data<uint8_t>() + row_offset(view_, row) * item,
        view_.column_stride,
        float_type_of(x_.dtype()),
        view_.columns,
        weight_.data<uint8_t>(),
        float_type_of(weight_.dtype()),
        bias_ ? bias_->data<uint8_t>() : nullptr,
        bias_ ? float_type_of(bias_->dtype()) : FloatType::float32,
        eps_,
        spare,
        y_.data<uint8_t>() + out * item,
    });
  }

  const mx::array &x_, &weight_;
  const mx::array* bias_;
  mx::array& y_;
  const float eps_;
  const bool reference_;
  const int workers_;
  const ViewParams view_;
  const int rows_, tile_;
  const NormKernel kernel_;
  const Shares<float> spare_;
};

void evaluate_norm(
    mx::Primitive& primitive,
    const Arrays& inputs,
    Arrays& outputs,
    float eps,
    bool reference) {
  const auto make = [&](auto& in, auto& out, Scratch& scratch, int workers) {
    return Norm(in, out[0], eps, reference, scratch, workers);
  };
  dispatch(primitive, inputs, outputs, make, reference);
}

}  // namespace

}  // namespace cpu

void RmsNorm::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  cpu::evaluate_norm(*this, inputs, outputs, eps_, reference_);
}

void LayerNorm::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  cpu::evaluate_norm(*this, inputs, outputs, eps_, reference_);
}

}  // namespace glm_fused
