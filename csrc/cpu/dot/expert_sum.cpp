#include <algorithm>

#include "checks.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"

namespace glm_fused {

namespace cpu {

namespace {

// Computes act = swiglu(gate, up), arrays of one shape.
struct SwigluAll {
  const mx::array &gate, &up;
  mx::array& act;

  void run() {
    const FloatType type = float_type_of(act.dtype());
    constexpr size_t kValues = 4096;  // so many are loaded at once
    float g[kValues], u[kValues];
    for (size_t at = 0; at < act.size(); at += kValues) {
      const int count = static_cast<int>(std::min(kValues, act.size() - at));
      load_values(gate, at, count, g);
      load_values(up, at, count, u);
      kernels().swiglu(g, u, g, count, type);
      store_row(act, at, g, count);
    }
  }
};

struct SumExperts {
  const mx::array &y, &scores;
  mx::array& out;
  std::span<float> row, sum;

  void run() {
    const int tokens = y.shape(0), top_k = y.shape(1), hidden = y.shape(2);
    for (int token = 0; token < tokens; token++) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int pair = token * top_k; pair < (token + 1) * top_k; pair++) {
        load_row(y, pair, hidden, row.data());
        kernels().add_scored(
            row.data(),
            scores.data<float>()[pair],
            hidden,
            FloatType::float32,
            sum.data());
      }
      const size_t offset = static_cast<size_t>(token) * hidden;
      store_row(out, offset, sum.data(), hidden);
    }
  }
};

}  // namespace

}  // namespace cpu

void Swiglu::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto make = [](auto& in, auto& out, cpu::Scratch&, int) {
    return cpu::SwigluAll{in[0], in[1], out[0]};
  };
  cpu::dispatch(*this, inputs, outputs, make);
}

void ExpertSum::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto make = [](auto& in, auto& out, cpu::Scratch& scratch, int) {
    const int hidden = in[0].shape(2);
    const auto row = scratch.take<float>(hidden);
    const auto sum = scratch.take<float>(hidden);
    return cpu::SumExperts{in[0], in[1], out[0], row, sum};
  };
  cpu::dispatch(*this, inputs, outputs, make);
}

}  // namespace glm_fused
