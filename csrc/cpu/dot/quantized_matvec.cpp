#include <algorithm>

#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/thread_pool.h"
#include "primitives.h"
#include "reference/reference.h"

namespace glm_fused {

namespace cpu {

namespace {

// Rows of x packed at once: their panels stay in a core's L2 cache.
constexpr int kMaxRows = 64;

// y for `count` rows of x that all meet slot `slot`; row i of them lies at
// `row_of(i)` in x and y. `parallel` says who spreads the work: this function
// over the rows of W, or its caller over the slots.
template <class RowOf>
void matvec_rows(
    const Matrix& w,
    int slot,
    const mx::array& x,
    mx::array& y,
    int count,
    bool parallel,
    RowOf&& row_of) {
  const size_t packed = w.kernel->packed_floats(w.k);
  const Floats panels = uninitialized(packed * count);
  const Floats row = uninitialized(w.k);
  for (int begin = 0; begin < count;) {
    const int width = panel_width(count - begin);
    for (int m = 0; m < width; m++) {
      load_row(x, row_of(begin + m), w.k, row.get());
      w.kernel->pack(row.get(), w.k, panels.get() + packed * begin, m, width);
    }
    begin += width;
  }
  const int tile = parallel ? tile_rows(w.n, 1) : kMaxTileRows;
  const auto task = [&](int t) {
    const int first = t * tile, rows = std::min(tile, w.n - first);
    float out[8 * kMaxTileRows];
    for (int begin = 0; begin < count;) {
      const int width = panel_width(count - begin);
      w.dot(slot, first, rows, panels.get() + packed * begin, width, out);
      for (int m = 0; m < width; m++) {
        const size_t at = row_of(begin + m) * w.n + first;
        store_row(y, at, out + m * rows, rows);
      }
      begin += width;
    }
  };
  const int tiles = (w.n + tile - 1) / tile;
  const double work = static_cast<double>(w.n) * w.k * count;
  parallel_for(tiles, task, parallel ? work : 0);
}

}  // namespace

void quantized_matvec(const Matrix& w, const mx::array& x, mx::array& y) {
  const int per_head = x.ndim() < 2 ? 1 : x.shape(-2);
  const int heads = w.slots;
  const size_t all = x.size() / w.k;
  const int batch = static_cast<int>(all / heads / std::max(per_head, 1));
  const int rows = batch * per_head;
  const auto head = [&](int h) {
    for (int begin = 0; begin < rows; begin += kMaxRows) {
      const int count = std::min(kMaxRows, rows - begin);
      matvec_rows(w, h, x, y, count, heads == 1, [&](int i) -> size_t {
        const int b = (begin + i) / per_head, m = (begin + i) % per_head;
        return (static_cast<size_t>(b) * heads + h) * per_head + m;
      });
    }
  };
  parallel_for(heads, head, static_cast<double>(w.n) * w.k * all);
}

}  // namespace cpu

void QuantizedMatvec::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto task = [format = format_, reference = reference_](
                        const auto& in, auto& out) {
    size_t next = 1;
    const cpu::Matrix w(in, next, format, in[0].shape(-1));
    if (reference) {
      reference::quantized_matvec(w, in[0], out[0]);
    } else {
      cpu::quantized_matvec(w, in[0], out[0]);
    }
  };
  cpu::dispatch(*this, inputs, outputs, task);
}

}  // namespace glm_fused
