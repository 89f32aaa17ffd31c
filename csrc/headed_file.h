// Files of other formats, read by MLX as if they were safetensors.
#pragma once

#include <string>
#include <unordered_map>

#include "mlx/mlx.h"

namespace glm_fused {

namespace mx = mlx::core;

// The arrays in the file at `path`, as `header`, the JSON text of a safetensors
// header, describes them: data_offsets count from the beginning of the file.
// Each is read when it is first evaluated, which throws std::runtime_error if
// it cannot be read whole. Throws std::runtime_error for a file that cannot be
// opened.
std::unordered_map<std::string, mx::array> load_with_header(
    const std::string& path,
    const std::string& header);

}  // namespace glm_fused
