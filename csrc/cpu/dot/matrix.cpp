#include "cpu/dot/matrix.h"

#include <algorithm>
#include <atomic>

#include "checks.h"
#include "cpu/runtime/thread_pool.h"
#include "rounding.h"

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
    const float* panel,
    int width,
    float* y) const {
  DotArgs args{{}, format, k, row, rows, n - row, panel, width, y};
  locate(slot, row, args.planes);
  kernel->dot(args);
}

void load_row(const mx::array& x, size_t row, int k, float* out) {
  load_values(x, row * k, k, out);
}

namespace {

// Loops of constant length are those that compilers turn into vectors.
template <class From, class To, class Convert>
void convert(const From* from, To* to, size_t count, Convert each) {
  constexpr size_t kTogether = 8;
  size_t i = 0;
  for (; i + kTogether <= count; i += kTogether) {
    for (size_t j = 0; j < kTogether; j++) {
      to[i + j] = each(from[i + j]);
    }
  }
  for (; i < count; i++) {
    to[i] = each(from[i]);
  }
}

}  // namespace

void load_values(const mx::array& x, size_t offset, int count, float* out) {
  if (x.dtype() == mx::float32) {
    std::copy_n(x.data<float>() + offset, count, out);
    return;
  }
  const uint16_t* from = x.data<uint16_t>() + offset;
  if (x.dtype() == mx::bfloat16) {
    convert(from, out, count, [](uint16_t h) { return from_bfloat16(h); });
  } else {
    convert(from, out, count, [](uint16_t h) { return from_float16(h); });
  }
}

void store_row(mx::array& a, size_t offset, const float* values, int count) {
  if (a.dtype() == mx::float32) {
    std::copy_n(values, count, a.data<float>() + offset);
    return;
  }
  uint16_t* to = a.data<uint16_t>() + offset;
  if (a.dtype() == mx::bfloat16) {
    convert(values, to, count, [](float f) { return to_bfloat16(f); });
  } else {
    convert(values, to, count, [](float f) { return to_float16(f); });
  }
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

int tile_rows(int n, int matrices, int workers) {
  const int64_t per_task = static_cast<int64_t>(n) * matrices / (4 * workers);
  return static_cast<int>(
      std::clamp<int64_t>(per_task / 4 * 4, 4, kMaxTileRows));
}

}  // namespace glm_fused::cpu
