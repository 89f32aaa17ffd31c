#include "cpu/dot/matrix.h"

#include <algorithm>
#include <atomic>

#include "checks.h"
#include "cpu/runtime/thread_pool.h"

namespace glm_fused::cpu {

namespace mx = mlx::core;

Matrix::Matrix(
    const std::vector<mx::array>& inputs,
    size_t& next,
    const Format& f,
    int columns)
    : format(f), k(columns) {
  const mx::array& rows = inputs[next];
  slots = rows.ndim() == 3 ? rows.shape(0) : 1;
  n = rows.shape(-2);
  fast_order = uses_fast_order(format, n, k);
  kernel = &kernels().find(format, fast_order);
  for (int p = 0; p < format.spec->plane_count; p++) {
    planes[p] = inputs[next++].data<uint8_t>();
    row_bytes[p] = format.row_bytes(p, k);
    matrix_bytes[p] = format.matrix_bytes(p, n, k);
  }
}

void Matrix::locate(int slot, int row, const uint8_t** at) const {
  for (int p = 0; p < kMaxPlanes; p++) {
    const int plane_row = row / format.spec->planes[p].rows;
    at[p] = planes[p] + slot * matrix_bytes[p] + plane_row * row_bytes[p];
  }
}

void Matrix::dot(
    int slot,
    int row,
    int rows,
    std::span<const float* const> panels,
    int width,
    float* y,
    const Rows& next) const {
  DotArgs args{{}, format, k, row, rows, n - row, panels, width, y};
  locate(slot, row, args.planes);
  const Matrix* other = next.matrix;
  if (other != nullptr && other->kernel == kernel && other->k == k &&
      other->format.spec == format.spec) {
    other->locate(next.slot, next.row, args.next);
  }
  kernel->dot(args);
}

void load_row(const mx::array& x, size_t row, int k, float* out) {
  load_values(x, row * k, k, out);
}

void load_values(const mx::array& x, size_t offset, int count, float* out) {
  const FloatType type = float_type_of(x.dtype());
  const uint8_t* from = x.data<uint8_t>() + offset * size_of(type);
  kernels().load(from, type, count, out);
}

void store_row(mx::array& a, size_t offset, const float* values, int count) {
  const FloatType type = float_type_of(a.dtype());
  uint8_t* to = a.data<uint8_t>() + offset * size_of(type);
  kernels().store(values, count, type, to);
}

uint32_t stream_read(const mx::array& a) {
  if (!a.flags().row_contiguous) {
    invalid("stream_read", "a must be contiguous.");
  }
  constexpr size_t kChunk = 1 << 18;
  const size_t chunks = (a.nbytes() + kChunk - 1) / kChunk;
  std::atomic<uint32_t> result{0};
  const auto task = [&](int i) {
    const size_t at = i * kChunk;
    const size_t count = std::min(kChunk, a.nbytes() - at);
    result |= kernels().read(a.data<uint8_t>() + at, count);
  };
  parallel_for(
      static_cast<int>(chunks),
      task,
      static_cast<double>(a.nbytes()),
      num_threads());
  return result;
}

int tile_rows(int n, int k, int matrices, int workers) {
  constexpr int kLeastWork = 1 << 12;
  const int64_t per_task = static_cast<int64_t>(n) * matrices / (4 * workers);
  const int64_t least = std::max(4, kLeastWork / std::max(k, 1));
  return static_cast<int>(
      std::clamp<int64_t>(std::max(per_task, least) / 4 * 4, 4, kMaxTileRows));
}

}  // namespace glm_fused::cpu
