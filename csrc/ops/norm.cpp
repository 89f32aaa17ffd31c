#include "checks.h"
#include "ops/placement.h"
#include "primitives.h"

namespace glm_fused {

namespace {

// Checks a norm's x and eps; returns x with the four axes that kernels take at
// most.
mx::array check_rows_of(
    const std::string& op,
    const mx::array& x,
    float eps,
    mx::StreamOrDevice s) {
  check_float(op, "x", x);
  if (x.ndim() < 1 || x.shape(-1) < 1) {
    invalid(
        op,
        "x must be [..., n] with at least one column but has shape ",
        shape_of(x),
        ".");
  }
  if (!(eps > 0)) {
    invalid(op, "eps must be greater than 0 but is ", eps, ".");
  }
  const mx::Shape& shape = x.shape();
  int64_t rows = 1;
  for (int axis : mx::Shape(shape.begin(), shape.end() - 1)) {
    check_count(op, "the rows of x", {rows, axis});
    rows *= axis;
  }
  return x.ndim() <= 4 ? x
                       : mx::flatten(x, 0, static_cast<int>(x.ndim()) - 4, s);
}

// Returns a norm's weight or bias as kernels take it.
mx::array check_columns(
    const std::string& op,
    const std::string& name,
    const mx::array& a,
    const mx::array& x,
    mx::StreamOrDevice s) {
  check_float(op, name, a);
  check_shape(op, name, a, {x.shape(-1)});
  return in_rows(a, s);
}

}  // namespace

mx::array rms_norm(
    const mx::array& x,
    const mx::array& weight,
    float eps,
    bool reference,
    mx::StreamOrDevice s) {
  const std::string op = "rms_norm";
  const mx::array rows = check_rows_of(op, x, eps, s);
  return mx::array(
      x.shape(),
      x.dtype(),
      place(std::make_shared<RmsNorm>(mx::to_stream(s), reference, eps)),
      {rows, check_columns(op, "weight", weight, x, s)});
}

mx::array layer_norm(
    const mx::array& x,
    const mx::array& weight,
    const mx::array& bias,
    float eps,
    bool reference,
    mx::StreamOrDevice s) {
  const std::string op = "layer_norm";
  const mx::array rows = check_rows_of(op, x, eps, s);
  return mx::array(
      x.shape(),
      x.dtype(),
      place(std::make_shared<LayerNorm>(mx::to_stream(s), reference, eps)),
      {rows,
       check_columns(op, "weight", weight, x, s),
       check_columns(op, "bias", bias, x, s)});
}

}  // namespace glm_fused
