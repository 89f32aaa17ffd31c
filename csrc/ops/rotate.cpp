#include "checks.h"
#include "ops/placement.h"
#include "primitives.h"

namespace glm_fused {

mx::array rotate(
    const mx::array& x,
    const mx::array& cosines,
    const mx::array& sines,
    bool interleaved,
    bool reference,
    mx::StreamOrDevice s) {
  const std::string op = "rotate";
  check_float(op, "x", x);
  if (x.ndim() != 4) {
    invalid(op, "x must be [b, h, l, d] but has shape ", shape_of(x), ".");
  }
  check_count(op, "the rows of x", {x.shape(0), x.shape(1), x.shape(2)});
  const int batch = x.shape(0), length = x.shape(2), columns = x.shape(3);
  const auto& c = cosines;
  if (c.ndim() != 4 || (c.shape(0) != 1 && c.shape(0) != batch) ||
      c.shape(1) != 1 || c.shape(2) != length || c.shape(3) > columns / 2) {
    invalid(
        op,
        "cos must be [",
        batch,
        " or 1, 1, ",
        length,
        ", at most ",
        columns / 2,
        "] but has shape ",
        shape_of(c),
        ".");
  }
  check_shape(op, "sin", sines, c.shape());
  for (const auto& [name, a] :
       {std::pair("cos", &cosines), std::pair("sin", &sines)}) {
    if (a->dtype() != mx::float32) {
      invalid(op, name, " must be float32 but is ", a->dtype(), ".");
    }
  }
  return mx::array(
      x.shape(),
      x.dtype(),
      place(std::make_shared<Rotate>(mx::to_stream(s), reference, interleaved)),
      {x, cosines, sines});
}

}  // namespace glm_fused
