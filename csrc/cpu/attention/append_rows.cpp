#include "appended_rows.h"
#include "cpu/attention/pack_rows.h"
#include "cpu/runtime/copy.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"

namespace glm_fused {

namespace {

void copy(mx::Primitive& append, const mx::array& from, const mx::array& to) {
  const auto make = [](auto& in, auto& out, cpu::Scratch&, int) {
    return cpu::Copy(in[0], out[0]);
  };
  std::vector<mx::array> target = {to};
  cpu::dispatch(append, {from}, target, make);
}

// Gives `whole` memory with the first `at` rows of `buffer`, and returns the
// next ones, which are to be written.
mx::array begin_append(
    mx::Primitive& append,
    const mx::array& buffer,
    int at,
    int count,
    mx::array& whole) {
  const auto allocate = [&](mx::array& a) {
    std::vector<mx::array> arrays = {a};
    cpu::allocate(append, arrays);
  };
  if (!place_appended(buffer, at, at + count, whole, allocate)) {
    copy(append, rows_between(buffer, 0, at), rows_between(whole, 0, at));
  }
  return rows_between(whole, at, at + count);
}

}  // namespace

void AppendRows::append(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    int at) {
  cpu::evaluate(*this, [&] {
    for (size_t i = 0; i < outputs.size(); i++) {
      const mx::array& rows = inputs[2 * i + 1];
      copy(
          *this,
          rows,
          begin_append(*this, inputs[2 * i], at, rows.shape(2), outputs[i]));
    }
  });
}

void AppendPacked::append(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    int at) {
  cpu::evaluate(*this, [&] {
    const std::vector<mx::array> rows(inputs.begin() + 1, inputs.end());
    std::vector<mx::array> target = {
        begin_append(*this, inputs[0], at, rows[0].shape(2), outputs[0])};
    const auto make = [&](auto& in, auto& out, cpu::Scratch&, int workers) {
      return cpu::PackRows(layout_, in, out[0], workers);
    };
    cpu::dispatch(*this, rows, target, make);
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
