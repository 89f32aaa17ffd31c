#include <algorithm>

#include "appended_rows.h"
#include "cache_primitives.h"
#include "cpu/attention/pack_rows.h"
#include "cpu/runtime/copy.h"
#include "huge_pages.h"

namespace glm_fused {

namespace {

// Rows that a query selects lie anywhere in a cache: in small pages, a core
// would wait for the look-up of most of them.
struct Zeros {
  mx::array& out;

  void run() const {
    auto* at = out.data<uint8_t>();
    const size_t bytes = out.nbytes();
    ask_for_huge_pages(at, bytes);
    std::fill_n(at, bytes, 0);
    move_to_huge_pages(at, bytes);  // what was in use before
  }
};

// Gives `whole` memory with the first `at` rows of `buffer` and place up to
// `end`: the buffer's own or, if others hold those rows, memory to which they
// are copied.
void keep_rows(
    mx::Primitive& append,
    const mx::array& buffer,
    int at,
    int end,
    mx::array& whole) {
  const auto allocate = [&](mx::array& a) {
    std::vector<mx::array> arrays = {a};
    cpu::allocate(append, arrays);
  };
  if (!place_appended(buffer, at, end, whole, allocate)) {
    cpu::copy(append, rows_between(buffer, 0, at), rows_between(whole, 0, at));
  }
}

}  // namespace

void CacheBuffer::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto make = [](auto&, auto& out, cpu::Scratch&, int) {
    return Zeros{out[0]};
  };
  cpu::dispatch(*this, inputs, outputs, make);
  take_new_rows(outputs[0], 0);
}

void Append::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  cpu::evaluate(*this, [&] {
    const int count = inputs[1].shape(2);
    std::vector<mx::array> targets;
    for (size_t i = 0; i < outputs.size(); i++) {
      keep_rows(*this, inputs[2 * i], at_, at_ + count, outputs[i]);
      targets.push_back(rows_between(outputs[i], at_, at_ + count));
    }
    write(inputs, targets);
  });
}

void AppendRows::write(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& targets) {
  for (size_t i = 0; i < targets.size(); i++) {
    cpu::copy(*this, inputs[2 * i + 1], targets[i]);
  }
}

void AppendPacked::write(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& targets) {
  const std::vector<mx::array> rows(inputs.begin() + 1, inputs.end());
  const auto make = [&](auto& in, auto& out, cpu::Scratch&, int workers) {
    return cpu::PackRows(layout_, in, out[0], workers);
  };
  cpu::dispatch(*this, rows, targets, make);
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
