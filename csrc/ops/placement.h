// Where a primitive runs.
#pragma once

#include <memory>

#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace glm_fused {

#ifdef GLM_FUSED_METAL_SIM
// sim/host: Linux MLX has no GPU stream, so a CPU stream stands for one, and
// `place` has a primitive on it run its `eval_gpu`.
mlx::core::StreamOrDevice metal_stream();
std::shared_ptr<mlx::core::Primitive> place(
    std::shared_ptr<mlx::core::Primitive> primitive);
#else
inline mlx::core::StreamOrDevice metal_stream() {
  return mlx::core::Device(mlx::core::Device::gpu);
}
inline std::shared_ptr<mlx::core::Primitive> place(
    std::shared_ptr<mlx::core::Primitive> primitive) {
  return primitive;
}
#endif

}  // namespace glm_fused
