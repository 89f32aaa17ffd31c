#include <algorithm>

#include "checks.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "swiglu.h"

namespace glm_fused {

namespace {

using Arrays = std::vector<mx::array>;

// act = swiglu(gate, up), arrays of one shape.
void swiglu_all(const Arrays& in, Arrays& out) {
  const FloatType type = float_type_of(out[0].dtype());
  constexpr size_t kValues = 4096;  // at once
  float gate[kValues], up[kValues];
  for (size_t at = 0; at < out[0].size(); at += kValues) {
    const int count = static_cast<int>(std::min(kValues, out[0].size() - at));
    cpu::load_values(in[0], at, count, gate);
    cpu::load_values(in[1], at, count, up);
    for (int i = 0; i < count; i++) {
      gate[i] = swiglu(gate[i], up[i], type);
    }
    cpu::store_row(out[0], at, gate, count);
  }
}

void sum_experts(const Arrays& in, Arrays& out) {
  const mx::array &y = in[0], &scores = in[1];
  const int tokens = y.shape(0), top_k = y.shape(1), hidden = y.shape(2);
  std::vector<float> row(hidden);
  for (int token = 0; token < tokens; token++) {
    std::vector<float> sum(hidden, 0.0f);
    for (int pair = token * top_k; pair < (token + 1) * top_k; pair++) {
      cpu::load_row(y, pair, hidden, row.data());
      for (int i = 0; i < hidden; i++) {
        const float term = row[i] * scores.data<float>()[pair];
        sum[i] = sum[i] + term;
      }
    }
    const size_t offset = static_cast<size_t>(token) * hidden;
    cpu::store_row(out[0], offset, sum.data(), hidden);
  }
}

}  // namespace

void Swiglu::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  cpu::dispatch(*this, inputs, outputs, swiglu_all);
}

void ExpertSum::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  cpu::dispatch(*this, inputs, outputs, sum_experts);
}

}  // namespace glm_fused
