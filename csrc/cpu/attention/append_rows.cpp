#include "appended_rows.h"
#include "cpu/runtime/copy.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"

namespace glm_fused {

void AppendRows::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto copy = [&](const mx::array& from, const mx::array& to) {
    const auto make = [](auto& in, auto& out, cpu::Scratch&, int) {
      return cpu::Copy(in[0], out[0]);
    };
    std::vector<mx::array> target = {to};
    cpu::dispatch(*this, {from}, target, make);
  };
  cpu::evaluate(*this, [&] {
    const auto allocate = [&](mx::array& a) {
      std::vector<mx::array> whole = {a};
      cpu::allocate(*this, whole);
    };
    for (size_t i = 0; i < outputs.size(); i++) {
      const mx::array &buffer = inputs[2 * i], &rows = inputs[2 * i + 1];
      const int end = at_ + rows.shape(2);
      if (!place_appended(buffer, at_, end, outputs[i], allocate)) {
        copy(rows_between(buffer, 0, at_), rows_between(outputs[i], 0, at_));
      }
      copy(rows, rows_between(outputs[i], at_, end));
    }
  });
}

void FirstRows::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  share_first_rows(inputs[0], outputs[0]);
}

void FirstRows::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  share_first_rows(inputs[0], outputs[0]);
}

}  // namespace glm_fused
