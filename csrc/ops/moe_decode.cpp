#include <algorithm>
#include <utility>

#include "checks.h"
#include "ops/known_ids.h"
#include "ops/placement.h"
#include "primitives.h"

namespace glm_fused {

namespace {

template <class T>
void check_slots_of(const std::string& op, const mx::array& slots, int count) {
  const T* slot = slots.data<T>();
  for (size_t i = 0; i < slots.size(); i++) {
    if (std::cmp_less(slot[i], 0) || std::cmp_greater_equal(slot[i], count)) {
      invalid(
          op,
          "slots[",
          i / slots.shape(1),
          ", ",
          i % slots.shape(1),
          "] must be in [0, ",
          count,
          ") but is ",
          slot[i],
          ".");
    }
  }
}

// Returns whether the slots need no check when they are evaluated; a bank's are
// checked as they come.
bool check_now(const mx::array& slots, int count, bool arrive) {
  if (arrive || known_below(slots, count)) {
    return true;
  }
  const bool readable = is_readable(slots);
  if (readable) {
    check_slots("moe_decode", slots, count);
  }
  return readable;
}

}  // namespace

void check_slots(const std::string& op, const mx::array& slots, int count) {
  if (slots.dtype() == mx::int32) {
    check_slots_of<int32_t>(op, slots, count);
  } else {
    check_slots_of<uint32_t>(op, slots, count);
  }
}

mx::array moe_decode(
    const mx::array& x,
    const Weight& gate,
    const Weight& up,
    const Weight& down,
    const mx::array& slots,
    const mx::array& scores,
    bool reference,
    bool prompt,
    const std::shared_ptr<Arrivals>& arrivals,
    mx::StreamOrDevice s) {
  const std::string op = "moe_decode";
  check_float(op, "x", x);
  if (x.ndim() != 2) {
    invalid(op, "x must be [tokens, hidden] but has shape ", shape_of(x), ".");
  }
  if (slots.ndim() != 2 || slots.shape(0) != x.shape(0)) {
    invalid(
        op,
        "slots must be [",
        x.shape(0),
        ", top_k] but has shape ",
        shape_of(slots),
        ".");
  }
  if (slots.shape(1) < 1) {
    invalid(op, "slots must name at least one expert for each token.");
  }
  check_count(op, "the tokens' choices", {slots.shape(0), slots.shape(1)});
  if (slots.dtype() != mx::int32 && slots.dtype() != mx::uint32) {
    invalid(op, "slots must be int32 or uint32 but is ", slots.dtype(), ".");
  }
  check_shape(op, "scores", scores, slots.shape());
  check_float(op, "scores", scores);
  const int hidden = x.shape(1);
  const Format gate_format = check_weight(op, "gate", gate, 3, hidden);
  const Format up_format = check_weight(op, "up", up, 3, hidden);
  const int intermediate = gate.rows().shape(1);
  const Format down_format = check_weight(op, "down", down, 3, intermediate);
  const int bank = gate.rows().shape(0);
  if (bank < 1) {
    invalid(op, "gate, up and down must have at least one slot.");
  }
  if (up.rows().shape(0) != bank || down.rows().shape(0) != bank ||
      up.rows().shape(1) != intermediate || down.rows().shape(1) != hidden) {
    invalid(
        op,
        "gate, up and down must be [slots, intermediate, hidden] twice and "
        "[slots, hidden, intermediate] but their weights have shapes ",
        shape_of(gate.rows()),
        ", ",
        shape_of(up.rows()),
        " and ",
        shape_of(down.rows()),
        ".");
  }
  // At most 256 tokens are taken together (cpu/dot/moe_decode.cpp).
  const int64_t choices =
      std::min(x.shape(0), 256) * static_cast<int64_t>(slots.shape(1));
  check_count(
      op, "the choices' values", {choices, std::max(intermediate, hidden)});
  std::vector<mx::array> inputs = {
      mx::contiguous(x, false, s),
      mx::contiguous(mx::astype(slots, mx::int32, s), false, s),
      mx::contiguous(mx::astype(scores, mx::float32, s), false, s)};
  append_arrays(inputs, gate, s);
  append_arrays(inputs, up, s);
  append_arrays(inputs, down, s);
  auto primitive = place(
      std::make_shared<MoeDecode>(
          mx::to_stream(s),
          reference,
          prompt,
          gate_format,
          up_format,
          down_format,
          arrivals,
          check_now(slots, bank, arrivals != nullptr)));
  return mx::array(x.shape(), x.dtype(), primitive, std::move(inputs));
}

}  // namespace glm_fused
