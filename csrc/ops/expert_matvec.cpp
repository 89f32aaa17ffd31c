#include "checks.h"
#include "ops/known_ids.h"
#include "primitives.h"

namespace glm_fused {

mx::array expert_matvec(
    const mx::array& x,
    const Weight& w,
    const mx::array& slots,
    bool reference,
    mx::StreamOrDevice s) {
  const std::string op = ExpertMatvec::name_of_op;
  check_float(op, "x", x);
  if (slots.ndim() != 2 || slots.shape(1) < 1) {
    invalid(
        op,
        "slots must be [tokens, top_k] but has shape ",
        shape_of(slots),
        ".");
  }
  if (slots.dtype() != mx::int32 && slots.dtype() != mx::uint32) {
    invalid(op, "slots must be int32 or uint32 but is ", slots.dtype(), ".");
  }
  const int tokens = slots.shape(0), top_k = slots.shape(1);
  const bool of_choices = x.ndim() == 3 && x.shape(1) == top_k;
  if ((x.ndim() != 2 && !of_choices) || x.shape(0) != tokens) {
    invalid(
        op,
        "x must be [",
        tokens,
        ", k] or [",
        tokens,
        ", ",
        top_k,
        ", k] but has shape ",
        shape_of(x),
        ".");
  }
  const Format format = check_weight(op, "w", w, 3, x.shape(-1));
  const int bank = w.rows().shape(0), n = w.rows().shape(1);
  if (bank < 1) {
    invalid(op, "w must have at least one slot.");
  }
  check_count(op, "the tokens' choices", {tokens, top_k});
  const bool readable = is_readable(slots);
  if (readable) {
    check_slots(op, slots, bank);
  }
  std::vector<mx::array> inputs = {
      mx::contiguous(x, false, s),
      mx::contiguous(mx::astype(slots, mx::int32, s), false, s)};
  append_arrays(inputs, w, s);
  auto primitive = std::make_shared<ExpertMatvec>(
      mx::to_stream(s),
      reference,
      format,
      readable || known_below(slots, bank));
  return mx::array({tokens, top_k, n}, x.dtype(), primitive, std::move(inputs));
}

}  // namespace glm_fused
