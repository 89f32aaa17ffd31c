#include "checks.h"
#include "cpu/dispatch.h"
#include "cpu/matrix.h"
#include "primitives.h"
#include "swiglu.h"

namespace glm_fused {

namespace {

using Arrays = std::vector<mx::array>;

// act = swiglu(gate, up), arrays of one shape.
void swiglu_all(const Arrays& in, Arrays& out) {
  const FloatType type = float_type_of(out[0].dtype());
  const int count = static_cast<int>(out[0].size());
  std::vector<float> gate(count), up(count);
  cpu::load_row(in[0], 0, count, gate.data());
  cpu::load_row(in[1], 0, count, up.data());
  for (int i = 0; i < count; i++) {
    gate[i] = swiglu(gate[i], up[i], type);
  }
  cpu::store_row(out[0], 0, gate.data(), count);
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
  cpu::dispatch(stream(), inputs, outputs, swiglu_all);
}

void ExpertSum::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  cpu::dispatch(stream(), inputs, outputs, sum_experts);
}

}  // namespace glm_fused
