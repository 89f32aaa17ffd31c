#include "formats/weight.h"

#include <algorithm>
#include <sstream>

#include "checks.h"

namespace glm_fused {

namespace {

std::string names_of(const std::vector<mx::Dtype>& dtypes) {
  std::ostringstream text;
  for (size_t i = 0; i < dtypes.size(); i++) {
    const bool last = i + 1 == dtypes.size();
    text << (i == 0 ? "" : last ? " or " : ", ") << dtypes[i];
  }
  return text.str();
}

void check_plane(
    const std::string& op,
    const std::string& name,
    const Weight& w,
    const PlaneSpec& plane,
    const mx::array& a,
    int k) {
  const std::vector<mx::Dtype> dtypes = dtypes_of(plane.type);
  if (std::ranges::find(dtypes, a.dtype()) == dtypes.end()) {
    invalid(
        op,
        name,
        " must be ",
        names_of(dtypes),
        " in format ",
        w.spec->name,
        " but is ",
        a.dtype(),
        ".");
  }
  mx::Shape shape = w.rows().shape();
  if (plane.per_matrix) {
    shape.resize(shape.size() - 2);
  } else {
    shape.back() = k / w.spec->block * plane.count;
    int& rows = shape[shape.size() - 2];
    rows = (rows + plane.rows - 1) / plane.rows;
  }
  check_shape(op, name, a, shape);
}

// The type that all planes of floats share.
FloatType
check_floats(const std::string& op, const std::string& name, const Weight& w) {
  const mx::array* first = nullptr;
  for (int i = 0; i < w.spec->plane_count; i++) {
    if (w.spec->planes[i].type != PlaneType::floats) {
      continue;
    }
    const mx::array& a = w.planes[i];
    if (first != nullptr && a.dtype() != first->dtype()) {
      invalid(
          op,
          name,
          ".",
          w.spec->planes[i].name,
          " must be ",
          first->dtype(),
          " like the other planes but is ",
          a.dtype(),
          ".");
    }
    first = &a;
  }
  return first == nullptr ? FloatType::float32 : float_type_of(first->dtype());
}

}  // namespace

// Evaluated weights are bound as they lie: mx::contiguous would copy a view
// of a larger buffer.
mx::array in_rows(const mx::array& a, mx::StreamOrDevice s) {
  return a.is_available() && a.flags().row_contiguous
      ? a
      : mx::contiguous(a, false, s);
}

std::vector<mx::Dtype> dtypes_of(PlaneType type) {
  switch (type) {
    case PlaneType::uint32:
      return {mx::uint32};
    case PlaneType::uint8:
      return {mx::uint8};
    case PlaneType::float32:
      return {mx::float32};
    case PlaneType::float16:
      return {mx::float16};
    case PlaneType::bfloat16:
      return {mx::bfloat16};
    default:
      return {mx::float32, mx::float16, mx::bfloat16};
  }
}

FloatType float_type_of(mx::Dtype dtype) {
  return dtype == mx::float32 ? FloatType::float32
      : dtype == mx::float16  ? FloatType::float16
                              : FloatType::bfloat16;
}

void check_planes(
    const std::string& op,
    const std::string& name,
    const Weight& w) {
  if (w.spec == nullptr) {
    invalid(op, name, ".format must be one of glm_fused.formats but is None.");
  }
  if (static_cast<int>(w.planes.size()) != w.spec->plane_count) {
    invalid(
        op,
        name,
        " must have ",
        w.spec->plane_count,
        w.spec->plane_count == 1 ? " plane" : " planes",
        " in format ",
        w.spec->name,
        " but has ",
        w.planes.size(),
        ".");
  }
}

Format check_weight(
    const std::string& op,
    const std::string& name,
    const Weight& w,
    int ndim,
    int k) {
  check_planes(op, name, w);
  const FormatSpec& spec = *w.spec;
  if (static_cast<int>(w.rows().ndim()) != ndim) {
    invalid(
        op,
        name,
        ".weight must have ",
        ndim,
        " dimensions but has shape ",
        shape_of(w.rows()),
        ".");
  }
  if (k < 1) {
    invalid(op, name, " must have at least one column but has ", k, ".");
  }
  if (k % spec.block != 0) {
    invalid(
        op,
        name,
        ": ",
        k,
        " columns are no whole number of groups of ",
        spec.block,
        ".");
  }
  for (int i = 0; i < spec.plane_count; i++) {
    const PlaneSpec& plane = spec.planes[i];
    const std::string full = name + "." + std::string(plane.name);
    check_plane(op, full, w, plane, w.planes[i], k);
  }
  return {
      &spec,
      spec.family == Family::dense ? float_type_of(w.rows().dtype())
                                   : check_floats(op, name, w)};
}

void append_arrays(
    std::vector<mx::array>& inputs,
    const Weight& w,
    mx::StreamOrDevice s) {
  for (const mx::array& plane : w.planes) {
    inputs.push_back(in_rows(plane, s));
  }
}

}  // namespace glm_fused
