// What Python hands to ops, and where they are to run.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include "mlx/mlx.h"
#include "ops.h"
#include "ops/placement.h"

namespace glm_fused {

namespace nb = nanobind;

// This is glm_fused.ops.Weight: planes and format. It takes a sequence, because
// the caster of a std::vector is noexcept: it ends the process where memory
// runs out.
using WeightTuple =
    std::tuple<nb::typed<nb::sequence, mx::array>, const FormatSpec*>;

inline Weight weight(const WeightTuple& t) {
  std::vector<mx::array> planes;
  for (nb::handle plane : std::get<0>(t)) {
    if (!nb::isinstance<mx::array>(plane)) {
      throw nb::type_error("a plane of a weight must be an array.");
    }
    planes.push_back(nb::cast<const mx::array&>(plane));
  }
  return {std::move(planes), std::get<1>(t)};
}

// Gate, up and down.
using MlpTuple = std::tuple<WeightTuple, WeightTuple, WeightTuple>;

inline Mlp mlp(const MlpTuple& t) {
  return {
      weight(std::get<0>(t)), weight(std::get<1>(t)), weight(std::get<2>(t))};
}

// The weight and eps of a norm.
using NormTuple = std::tuple<mx::array, float>;

inline Norm norm(const NormTuple& t) {
  return {std::get<0>(t), std::get<1>(t)};
}

// The code that runs an op (glm_fused.ops.routes).
enum class Kernel { cpu, metal, metal_prompt, loops, mlx };

inline bool is_reference(Kernel kernel) {
  return kernel == Kernel::loops;
}

// Returns the stream that is asked for, or the default one of the kernel's
// device.
inline mx::StreamOrDevice on(Kernel kernel, const mx::StreamOrDevice& asked) {
  if (kernel == Kernel::mlx) {
    throw std::invalid_argument("[ops] MLX's own ops are not called here.");
  }
  if (kernel == Kernel::metal || kernel == Kernel::metal_prompt) {
    return metal_stream(asked);
  }
  const mx::Device cpu(mx::Device::cpu);
  if (std::holds_alternative<std::monostate>(asked)) {
    return cpu;
  }
  const mx::Stream stream = mx::to_stream(asked);
  return stream.device == cpu ? mx::StreamOrDevice(stream) : cpu;
}

}  // namespace glm_fused
