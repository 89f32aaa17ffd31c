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
    const Format& f)
    : format(f), scales(nullptr), biases(nullptr) {
  const auto take = [&] { return inputs[next++]; };
  const mx::array w = take();
  slots = w.ndim() == 3 ? w.shape(0) : 1;
  n = w.shape(-2);
  const int64_t words = w.shape(-1);
  k = format.mode == Mode::dense ? w.shape(-1)
                                 : static_cast<int>(words * 32 / format.bits);
  fast_order = uses_fast_order(format, n, k);
  kernel = &kernels().find(format, fast_order);
  weight = w.data<uint8_t>();
  if (format.mode != Mode::dense) {
    scales = take().data<uint8_t>();
  }
  if (format.mode == Mode::affine) {
    biases = take().data<uint8_t>();
  }
}

void Matrix::dot(
    int slot,
    int row,
    int rows,
    const float* panel,
    int width,
    float* y) const {
  const size_t first = static_cast<size_t>(slot) * n + row;
  const size_t scale = first * format.groups(k) * format.scale_bytes();
  kernel->dot(
      {weight + first * format.row_bytes(k),
       scales ? scales + scale : nullptr,
       biases ? biases + scale : nullptr,
       format,
       k,
       rows,
       panel,
       width,
       y});
}

void load_row(const mx::array& x, size_t row, int k, float* out) {
  load_values(x, row * k, k, out);
}

void load_values(const mx::array& x, size_t offset, int count, float* out) {
  if (x.dtype() == mx::float32) {
    std::copy_n(x.data<float>() + offset, count, out);
    return;
  }
  const uint16_t* from = x.data<uint16_t>() + offset;
  if (x.dtype() == mx::bfloat16) {
    std::transform(from, from + count, out, from_bfloat16);
  } else {
    std::transform(from, from + count, out, from_float16);
  }
}

void store_row(mx::array& a, size_t offset, const float* values, int count) {
  if (a.dtype() == mx::float32) {
    std::copy_n(values, count, a.data<float>() + offset);
    return;
  }
  uint16_t* to = a.data<uint16_t>() + offset;
  if (a.dtype() == mx::bfloat16) {
    std::transform(values, values + count, to, to_bfloat16);
  } else {
    std::transform(values, values + count, to, to_float16);
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
