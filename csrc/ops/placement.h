// These say where a primitive runs.
#pragma once

#include <memory>

#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace glm_fused {

#ifdef GLM_FUSED_METAL_SIM
// sim/host: Linux MLX has no GPU stream, so a CPU stream stands for one, and
// `place` has a primitive on it run its `eval_gpu`.
mlx::core::StreamOrDevice metal_stream(const mlx::core::StreamOrDevice& asked);
std::shared_ptr<mlx::core::Primitive> place(
    std::shared_ptr<mlx::core::Primitive> primitive);
// Returns the primitive that `place` was given.
mlx::core::Primitive& placed(mlx::core::Primitive& primitive);
// Tells whether primitives on the stream run their `eval_gpu`.
bool is_metal(const mlx::core::StreamOrDevice& stream);
#else
// Returns the stream that is asked for, or the GPU's default one.
inline mlx::core::StreamOrDevice metal_stream(
    const mlx::core::StreamOrDevice& asked) {
  return std::holds_alternative<std::monostate>(asked)
      ? mlx::core::Device(mlx::core::Device::gpu)
      : asked;
}
inline std::shared_ptr<mlx::core::Primitive> place(
    std::shared_ptr<mlx::core::Primitive> primitive) {
  return primitive;
}
inline mlx::core::Primitive& placed(mlx::core::Primitive& primitive) {
  return primitive;
}
inline bool is_metal(const mlx::core::StreamOrDevice& stream) {
  return mlx::core::to_stream(stream).device == mlx::core::Device::gpu;
}
#endif

}  // namespace glm_fused
