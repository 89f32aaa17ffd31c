#include "checks.h"
#include "ops/placement.h"
#include "primitives.h"

namespace glm_fused {

mx::array
swiglu(const mx::array& gate, const mx::array& up, mx::StreamOrDevice s) {
  const std::string op = "swiglu";
  check_float(op, "gate", gate);
  check_shape(op, "up", up, gate.shape());
  if (up.dtype() != gate.dtype()) {
    invalid(op, "up must be ", gate.dtype(), " but is ", up.dtype(), ".");
  }
  return mx::array(
      gate.shape(),
      gate.dtype(),
      place(std::make_shared<Swiglu>(mx::to_stream(s))),
      {mx::contiguous(gate, false, s), mx::contiguous(up, false, s)});
}

mx::array
expert_sum(const mx::array& y, const mx::array& scores, mx::StreamOrDevice s) {
  const std::string op = "expert_sum";
  check_float(op, "y", y);
  if (y.ndim() != 3) {
    invalid(
        op,
        "y must be [tokens, top_k, hidden] but has shape ",
        shape_of(y),
        ".");
  }
  check_float(op, "scores", scores);
  check_shape(op, "scores", scores, {y.shape(0), y.shape(1)});
  check_count(op, "the tokens' choices", {y.shape(0), y.shape(1)});
  return mx::array(
      {y.shape(0), y.shape(2)},
      y.dtype(),
      place(std::make_shared<ExpertSum>(mx::to_stream(s))),
      {mx::contiguous(y, false, s),
       mx::contiguous(mx::astype(scores, mx::float32, s), false, s)});
}

}  // namespace glm_fused
