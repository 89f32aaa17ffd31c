// A weight as MLX arrays, and the check that it is what its format says.
#pragma once

#include <string>
#include <vector>

#include "formats/format.h"
#include "mlx/mlx.h"

namespace glm_fused {

namespace mx = mlx::core;

// The planes of a matrix [..., n, k], in the order of `spec`.
struct Weight {
  std::vector<mx::array> planes;
  const FormatSpec* spec;

  const mx::array& rows() const {
    return planes[0];
  }
};

// The types that a plane may have, the widest first.
std::vector<mx::Dtype> dtypes_of(PlaneType type);

FloatType float_type_of(mx::Dtype dtype);

// `w` has a format and as many planes as that names; throws as check_weight.
void check_planes(
    const std::string& op,
    const std::string& name,
    const Weight& w);

// The format of `w`, whose planes must have `ndim` dimensions and `k` columns,
// at least one.
// Throws std::invalid_argument, naming the plane.
Format check_weight(
    const std::string& op,
    const std::string& name,
    const Weight& w,
    int ndim,
    int k);

// The array, row-contiguous.
mx::array in_rows(const mx::array& a, mx::StreamOrDevice s);

// The planes, row-contiguous.
void append_arrays(
    std::vector<mx::array>& inputs,
    const Weight& w,
    mx::StreamOrDevice s);

}  // namespace glm_fused
