// The CPU kernels' seam: one table per instruction set, picked at run time.
#pragma once

#include <cstdint>

#include "formats/format.h"

namespace glm_fused::cpu {

// Rows of W that one call may cover: enough bytes in a row for the processor's
// own prefetcher to get going.
constexpr int kMaxTileRows = 256;

// y[m * rows + r] = sum_k x[m][k] W[r][k] in fp32, in MLX's lane order.
struct DotArgs {
  const uint8_t* planes[kMaxPlanes];  // row 0 of the tile in each
  Format format;
  int k;
  int row;  // of the matrix, that is row 0 of the tile
  int rows;
  const float* x;  // a panel: `width` vectors, packed by Kernel::pack
  int width;       // 1, 2, 4 or 8
  float* y;
};

struct Kernel {
  void (*dot)(const DotArgs&);
  // Lays x[k] out as vector m of a panel: lane by lane, pre-scaled as MLX's
  // load_vector does.
  void (*pack)(const float* x, int k, float* panel, int m, int width);
  int values_per_lane;
  int floats_per_block;  // of one packed vector, per 32 lanes

  size_t packed_floats(int k) const {
    const int block = 32 * values_per_lane;
    return static_cast<size_t>((k + block - 1) / block) * floats_per_block;
  }
};

// The widest panel that `left` vectors fill.
inline int panel_width(int left) {
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

struct KernelSet {
  const char* name;
  const Kernel& (*find)(const Format& format, bool fast_order);
  // act = silu(gate) * up, the inputs and each step rounded to `type`.
  void (*swiglu)(
      const float* gate,
      const float* up,
      float* act,
      int count,
      FloatType type);
  // Reads `count` bytes in order and folds them: the yardstick of benchmarks.
  uint32_t (*read)(const uint8_t* from, size_t count);
};

const KernelSet& portable_kernels();
#if defined(__x86_64__)
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
#endif

// The best set for this processor, or the one named in GLM_FUSED_KERNELS.
const KernelSet& kernels();

}  // namespace glm_fused::cpu
