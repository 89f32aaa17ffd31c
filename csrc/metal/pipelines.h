// Kernels compiled at run time, each an instance of a template in a shader.
#pragma once

#include <string>

#include "formats/format.h"
#include "mlx/backend/metal/device.h"
#include "ops.h"

namespace glm_fused::metal {

// Gives the shader's name for a type, and for a format in the order that MLX
// takes for [n, k].
std::string type_name(mx::Dtype dtype);
std::string format_name(const Format& format, int n, int k);

// Gives the kernel `function` of `source`, e.g. "index_select", or the instance
// "moe_down_sum<half, Dense<half>, 4, 1>" of a template, compiled on first use.
MTL::ComputePipelineState* kernel(
    mx::metal::Device& device,
    const char* source,
    const std::string& function);

// Gives `wanted` simdgroups, or as many as the kernel's registers allow.
int simdgroups(MTL::ComputePipelineState* kernel, int wanted);

size_t threadgroup_bytes(size_t words);

// Gives how many blocks of `size` hold `count`.
inline int blocks(int count, int size) {
  return (count + size - 1) / size;
}

mx::array allocate(mx::Shape shape, mx::Dtype dtype);

// Binds a weight's planes to kMaxPlanes buffers from `index` on; what a format
// lacks is bound to the first one and never read.
void bind_weight(
    mx::metal::CommandEncoder& encoder,
    const mx::array* planes,
    const Format& format,
    int index);

}  // namespace glm_fused::metal
