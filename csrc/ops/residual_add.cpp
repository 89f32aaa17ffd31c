#include "checks.h"
#include "primitives.h"

namespace glm_fused {

mx::array
residual_add(const mx::array& x, const mx::array& y, mx::StreamOrDevice s) {
  const std::string op = "residual_add";
  check_float(op, "x", x);
  check_shape(op, "y", y, x.shape());
  if (y.dtype() != x.dtype()) {
    invalid(op, "y must be ", x.dtype(), " but is ", y.dtype(), ".");
  }
  return mx::array(
      x.shape(),
      x.dtype(),
      std::make_shared<ResidualAdd>(mx::to_stream(s)),
      {mx::contiguous(x, false, s), mx::contiguous(y, false, s)});
}

}  // namespace glm_fused
