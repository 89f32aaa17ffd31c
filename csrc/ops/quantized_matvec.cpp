#include "checks.h"
#include "primitives.h"

namespace glm_fused {

mx::array quantized_matvec(
    const mx::array& x,
    const Weight& w,
    bool reference,
    mx::StreamOrDevice s) {
  const std::string op = "quantized_matvec";
  check_float(op, "x", x);
  check_planes(op, "w", w);
  const int ndim = static_cast<int>(w.rows().ndim());
  if (ndim != 2 && ndim != 3) {
    invalid(
        op,
        "w.weight must have 2 or 3 dimensions but has shape ",
        shape_of(w.rows()),
        ".");
  }
  if (static_cast<int>(x.ndim()) < ndim) {
    invalid(
        op,
        "x must have at least ",
        ndim,
        " dimensions but has shape ",
        shape_of(x),
        ".");
  }
  const Format format = check_weight(op, "w", w, ndim, x.shape(-1));
  if (ndim == 3 && x.shape(-3) != w.rows().shape(0)) {
    invalid(
        op,
        "x must have ",
        w.rows().shape(0),
        " heads in its third last dimension but has shape ",
        shape_of(x),
        ".");
  }
  check_count(
      op, "the rows of x", {static_cast<int64_t>(x.size()) / x.shape(-1)});
  auto shape = x.shape();
  shape.back() = w.rows().shape(-2);
  std::vector<mx::array> inputs = {mx::contiguous(x, false, s)};
  append_arrays(inputs, w, s);
  auto primitive =
      std::make_shared<QuantizedMatvec>(mx::to_stream(s), reference, format);
  return mx::array(shape, x.dtype(), primitive, std::move(inputs));
}

}  // namespace glm_fused
