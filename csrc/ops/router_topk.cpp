#include "checks.h"
#include "ops/placement.h"
#include "primitives.h"

namespace glm_fused {

namespace {

void check_routing(const std::string& op, const Routing& r, int experts) {
  if (r.n_group < 1 || experts % r.n_group != 0) {
    invalid(
        op,
        "n_group must divide the ",
        experts,
        " experts but is ",
        r.n_group,
        ".");
  }
  if (r.topk_group < 1 || r.topk_group > r.n_group) {
    invalid(
        op,
        "topk_group must be between 1 and n_group, ",
        r.n_group,
        ", but is ",
        r.topk_group,
        ".");
  }
  if (r.n_group > 1 && experts / r.n_group < 2) {
    invalid(op, "n_group ", r.n_group, " leaves fewer than two experts each.");
  }
  const int eligible = experts / r.n_group * r.topk_group;
  if (r.top_k < 1 || r.top_k > eligible) {
    invalid(
        op,
        "top_k must be between 1 and the ",
        eligible,
        " eligible experts but is ",
        r.top_k,
        ".");
  }
}

}  // namespace

std::pair<mx::array, mx::array> router_topk(
    const mx::array& x,
    const mx::array& weight,
    const mx::array& correction_bias,
    const Routing& routing,
    bool reference,
    mx::StreamOrDevice s) {
  const std::string op = "router_topk";
  check_float(op, "x", x);
  if (x.ndim() != 2) {
    invalid(op, "x must be [tokens, hidden] but has shape ", shape_of(x), ".");
  }
  check_float(op, "weight", weight);
  if (weight.ndim() != 2 || weight.shape(1) != x.shape(1)) {
    invalid(
        op,
        "weight must be [experts, ",
        x.shape(1),
        "] but has shape ",
        shape_of(weight),
        ".");
  }
  if (x.shape(1) < 1) {
    invalid(op, "x must have at least one column but has none.");
  }
  const int experts = weight.shape(0);
  check_shape(op, "correction_bias", correction_bias, {experts});
  check_float(op, "correction_bias", correction_bias);
  check_routing(op, routing, experts);
  const mx::Shape shape = {x.shape(0), routing.top_k};
  auto outputs = mx::array::make_arrays(
      {shape, shape},
      {mx::int32, mx::float32},
      place(std::make_shared<RouterTopk>(mx::to_stream(s), reference, routing)),
      {mx::contiguous(x, false, s),
       mx::contiguous(weight, false, s),
       mx::contiguous(mx::astype(correction_bias, mx::float32, s), false, s)});
  return {outputs[0], outputs[1]};
}

}  // namespace glm_fused
