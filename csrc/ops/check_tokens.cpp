#include <cstdint>
#include <utility>

#include "checks.h"
#include "cpu/runtime/dispatch.h"
#include "mlx/primitives.h"
#include "ops/known_ids.h"

namespace glm_fused {

namespace {

// Throws for ids outside the vocabulary, and copies the ids to `copies`, unless
// that is null.
template <class T>
void copy_ids(const mx::array& tokens, int vocabulary, int32_t* copies) {
  const T* ids = tokens.data<T>();
  const auto length = static_cast<size_t>(tokens.shape(-1));
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

void copy_ids(const mx::array& tokens, int vocabulary, int32_t* copies) {
  switch (tokens.dtype()) {
    case mx::int8:
      return copy_ids<int8_t>(tokens, vocabulary, copies);
    case mx::int16:
      return copy_ids<int16_t>(tokens, vocabulary, copies);
    case mx::int32:
      return copy_ids<int32_t>(tokens, vocabulary, copies);
    case mx::int64:
      return copy_ids<int64_t>(tokens, vocabulary, copies);
    case mx::uint8:
      return copy_ids<uint8_t>(tokens, vocabulary, copies);
    case mx::uint16:
      return copy_ids<uint16_t>(tokens, vocabulary, copies);
    case mx::uint32:
      return copy_ids<uint32_t>(tokens, vocabulary, copies);
    default:
      return copy_ids<uint64_t>(tokens, vocabulary, copies);
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
      copy_ids(inputs[0], vocabulary_, outputs[0].data<int32_t>());
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
    copy_ids(tokens, vocabulary, nullptr);
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

}  // namespace glm_fused
