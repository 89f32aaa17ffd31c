#include <cstdint>
#include <utility>

#include "checks.h"
#include "cpu/runtime/dispatch.h"
#include "mlx/primitives.h"
#include "ops/known_ids.h"

namespace glm_fused {

namespace {

// Throws for ids outside the vocabulary, and copies the ids to `copies`, unless
// that is null. A row has `length` of them.
template <class T>
void copy_ids(
    const mx::array& tokens,
    size_t length,
    int vocabulary,
    int32_t* copies) {
  const T* ids = tokens.data<T>();
  for (size_t i = 0; i < tokens.size(); i++) {
    if (std::cmp_less(ids[i], 0) ||
        std::cmp_greater_equal(ids[i], vocabulary)) {
      invalid(
          "model",
          "tokens must be from 0 to ",
          vocabulary - 1,
          ", the vocabulary, but [",
          i / length,
          ", ",
          i % length,
          "] is ",
          std::to_string(ids[i]),
          ".");
    }
    if (copies) {
      copies[i] = static_cast<int32_t>(ids[i]);
    }
  }
}

void copy_ids(
    const mx::array& tokens,
    size_t length,
    int vocabulary,
    int32_t* copies) {
  switch (tokens.dtype()) {
    case mx::int8:
      return copy_ids<int8_t>(tokens, length, vocabulary, copies);
    case mx::int16:
      return copy_ids<int16_t>(tokens, length, vocabulary, copies);
    case mx::int32:
      return copy_ids<int32_t>(tokens, length, vocabulary, copies);
    case mx::int64:
      return copy_ids<int64_t>(tokens, length, vocabulary, copies);
    case mx::uint8:
      return copy_ids<uint8_t>(tokens, length, vocabulary, copies);
    case mx::uint16:
      return copy_ids<uint16_t>(tokens, length, vocabulary, copies);
    case mx::uint32:
      return copy_ids<uint32_t>(tokens, length, vocabulary, copies);
    default:
      return copy_ids<uint64_t>(tokens, length, vocabulary, copies);
  }
}

// inputs: tokens [b, l]. output: the same, int32. It waits for its input, so
// that nothing after it runs on tokens outside the vocabulary.
class CheckTokens : public mx::Primitive {
 public:
  CheckTokens(mx::Stream stream, int vocabulary)
      : mx::Primitive(stream), vocabulary_(vocabulary) {}

  void eval_cpu(
      const std::vector<mx::array>& inputs,
      std::vector<mx::array>& outputs) override {
    cpu::evaluate(*this, [&] {
      cpu::allocate(*this, outputs);
      cpu::wait_for(inputs[0], stream());
      const mx::array& tokens = inputs[0];
      copy_ids(
          tokens, tokens.shape(-1), vocabulary_, outputs[0].data<int32_t>());
    });
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&)
      override {
    throw std::runtime_error("[CheckTokens] runs on a CPU stream.");
  }
  const char* name() const override {
    return "CheckTokens";
  }

 private:
  int vocabulary_;
};

}  // namespace

mx::array
check_tokens(const mx::array& tokens, int vocabulary, mx::StreamOrDevice s) {
  if (!mx::issubdtype(tokens.dtype(), mx::integer) || tokens.ndim() != 2) {
    invalid(
        "check_tokens",
        "tokens must be integers [batch, length] but are ",
        tokens.dtype(),
        " of shape ",
        shape_of(tokens),
        ".");
  }
  if (is_readable(tokens)) {
    copy_ids(tokens, tokens.shape(-1), vocabulary, nullptr);
    return tokens;
  }
  if (known_below(tokens, vocabulary)) {
    return tokens;
  }
  return mx::array(
      tokens.shape(),
      mx::int32,
      std::make_shared<CheckTokens>(mx::to_stream(s), vocabulary),
      {mx::contiguous(tokens, false, s)});
}

TokensOfStep
tokens_of_step(const mx::array& tokens, int vocabulary, mx::StreamOrDevice s) {
  const auto fits = [](const mx::array& a) {
    return a.dtype() == mx::int32 || a.dtype() == mx::uint32;
  };
  if (fits(tokens) && !is_readable(tokens)) {
    if (auto computed = being_computed(tokens)) {
      return {tokens, LateCheck{*computed, tokens.shape(-1), vocabulary}};
    }
  }
  const mx::array ids = check_tokens(tokens, vocabulary, s);
  return {fits(ids) ? ids : mx::astype(ids, mx::int32, s), std::nullopt};
}

void LateCheck::operator()() const {
  mx::array ids = computed;
  ids.wait();
  copy_ids(ids, length, vocabulary, nullptr);
}

}  // namespace glm_fused
