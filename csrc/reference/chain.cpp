#include <vector>

#include "reference/reference.h"
#include "swiglu.h"

namespace glm_fused::reference {

namespace mx = mlx::core;

void quantized_matvec(const cpu::Matrix& w, const mx::array& x, mx::array& y) {
  const size_t rows = x.size() / w.k;
  const size_t per_head = x.shape(-2);
  std::vector<float> in(w.k), out(w.n);
  for (size_t row = 0; row < rows; row++) {
    const int slot = static_cast<int>(row / per_head % w.slots);
    cpu::load_row(x, row, w.k, in.data());
    for (int n = 0; n < w.n; n++) {
      out[n] = dot(w, w.slots == 1 ? 0 : slot, n, in.data());
    }
    cpu::store_row(y, row * w.n, out.data(), w.n);
  }
}

namespace {

// Does what gather_qmm does for one token and one slot; the result is stored in
// the activation type.
std::vector<float>
project(const cpu::Matrix& w, int slot, const float* x, FloatType type) {
  std::vector<float> y(w.n);
  for (int n = 0; n < w.n; n++) {
    y[n] = round_to(dot(w, slot, n, x), type);
  }
  return y;
}

}  // namespace

void moe_decode(const cpu::Moe& moe) {
  const int top_k = moe.slots.shape(1), hidden = moe.down.n;
  std::vector<float> x(hidden);
  for (int token = 0; token < moe.x.shape(0); token++) {
    cpu::load_row(moe.x, token, hidden, x.data());
    std::vector<float> sum(hidden, 0.0f);
    for (int j = token * top_k; j < (token + 1) * top_k; j++) {
      const int slot = moe.slots.data<int32_t>()[j];
      auto act = project(moe.gate, slot, x.data(), moe.type);
      const auto up = project(moe.up, slot, x.data(), moe.type);
      for (size_t i = 0; i < act.size(); i++) {
        act[i] = swiglu(act[i], up[i], moe.type);
      }
      const auto y = project(moe.down, slot, act.data(), moe.type);
      for (int i = 0; i < hidden; i++) {
        const float term = y[i] * moe.scores.data<float>()[j];
        sum[i] = sum[i] + term;
      }
    }
    const size_t offset = static_cast<size_t>(token) * hidden;
    cpu::store_row(moe.y, offset, sum.data(), hidden);
  }
}

void expert_matvec(
    const cpu::Matrix& w,
    const mx::array& x,
    const mx::array& slots,
    mx::array& y) {
  const size_t top_k = slots.shape(1);
  const FloatType type = float_type_of(y.dtype());
  std::vector<float> in(w.k);
  for (size_t pair = 0; pair < slots.size(); pair++) {
    cpu::load_row(x, x.ndim() == 2 ? pair / top_k : pair, w.k, in.data());
    const int slot = slots.data<int32_t>()[pair];
    const auto out = project(w, slot, in.data(), type);
    cpu::store_row(y, pair * w.n, out.data(), w.n);
  }
}

void router_logits(const cpu::Matrix& w, const mx::array& x, float* logits) {
  std::vector<float> in(w.k);
  for (int token = 0; token < x.shape(0); token++) {
    cpu::load_row(x, token, w.k, in.data());
    for (int n = 0; n < w.n; n++) {
      logits[static_cast<size_t>(token) * w.n + n] = dot(w, 0, n, in.data());
    }
  }
}

}  // namespace glm_fused::reference
