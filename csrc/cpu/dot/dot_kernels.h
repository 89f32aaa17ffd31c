// The CPU kernels are reached through one table per instruction set, which is
// picked at run time.
#pragma once

#include <cstdint>
#include <span>

#include "formats/format.h"

namespace glm_fused::cpu {

// One call covers at most so many rows of W, which are enough bytes in a row
// for the processor's own prefetcher to get going.
constexpr int kMaxTileRows = 256;
// And so many panels, of which each decoded weight meets all.
constexpr int kMaxPanels = 8;

// What a kernel computes y[m * rows + r] = sum_k x[m][k] W[r][k] from, in fp32
// and in MLX's lane order.
struct DotArgs {
  const uint8_t* planes[kMaxPlanes];  // row 0 of the tile in each
  Format format;
  int k;
  int row;  // of the matrix, that is row 0 of the tile
  int rows;
  int rows_left;  // of the matrix, from row 0 of the tile on
  // Panels of `width` vectors each, packed by Kernel::pack.
  std::span<const float* const> x;
  int width;  // 1, 2, 4 or 8
  float* y;   // [panels, width, rows]
  // The same of rows of the same shape that are likely to follow, whose first
  // ones are fetched while the last of these are met; null: those behind them.
  const uint8_t* next[kMaxPlanes] = {};
};

struct Kernel {
  void (*dot)(const DotArgs&);
  // Lays x[k] out as vector m of a panel: lane by lane, pre-scaled as MLX's
  // load_vector does.
  void (*pack)(const float* x, int k, float* panel, int m, int width);
  int values_per_lane;
  int floats_per_block;  // of a packed vector, for 32 lanes

  size_t packed_floats(int k) const {
    const int block = 32 * values_per_lane;
    return static_cast<size_t>((k + block - 1) / block) * floats_per_block;
  }
};

// Returns the width of the widest panel that `left` vectors fill.
inline int panel_width(int left) {
  return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

struct KernelSet {
  const char* name;
  const Kernel& (*find_stock)(const Format& format, bool fast_order);
  const Kernel& (*find_gguf)(const Format& format);
  // Computes act = silu(gate) * up; the inputs and each step are rounded to
  // `type`.
  void (*swiglu)(
      const float* gate,
      const float* up,
      float* act,
      int count,
      FloatType type);
  // Adds score times y, which is rounded to `type` first, to sum, with one
  // rounding per multiply and per add.
  void (*add_scored)(
      const float* y,
      float score,
      size_t count,
      FloatType type,
      float* sum);
  // Loads values of a type as fp32; stores fp32 values rounded to one.
  void (*load)(const uint8_t* from, FloatType type, size_t count, float* to);
  void (*store)(const float* from, size_t count, FloatType type, uint8_t* to);
  // Reads `count` bytes in order and folds them. Benchmarks measure against it.
  uint32_t (*read)(const uint8_t* from, size_t count);

  const Kernel& find(const Format& format, bool fast_order) const {
    return is_gguf(format.family()) ? find_gguf(format)
                                    : find_stock(format, fast_order);
  }
};

const Kernel& gguf_kernel_portable(const Format& format);
#if defined(__x86_64__)
const Kernel& gguf_kernel_avx2(const Format& format);
const Kernel& gguf_kernel_avx512(const Format& format);
#endif

const KernelSet& portable_kernels();
#if defined(__x86_64__)
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
#endif

// Returns the best set for this processor, or the one that GLM_FUSED_KERNELS
// names.
const KernelSet& kernels();

}  // namespace glm_fused::cpu
