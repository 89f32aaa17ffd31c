#include <algorithm>

#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "reference/reference.h"

namespace glm_fused {

namespace cpu {

namespace {

// This many rows of x are packed at once, panels that the kernels take
// together. A tile packs a panel of kWidth; few values leave no tiles.
constexpr int kWidth = 8, kMaxRows = kMaxPanels * kWidth;
constexpr int kFewValues = 1 << 13;

// Computes y = x W^T. The work of one head is spread over the rows of W, for
// kMaxRows rows of x at a time; of several heads, each is done by one thread,
// with panels of its own.
class Matvec : public Staged {
 public:
  Matvec(
      const Matrix& w,
      bool reference,
      const mx::array& x,
      mx::array& y,
      Scratch& scratch,
      int workers)
      : w_(w),
        reference_(reference),
        x_(x),
        y_(y),
        workers_(workers),
        per_head_(x.ndim() < 2 ? 1 : x.shape(-2)),
        all_(x.size() / w.k),
        rows_(
            static_cast<int>(all_ / w.slots / std::max(per_head_, 1)) *
            per_head_),
        packed_(w.kernel->packed_floats(w.k)) {
    const int packers = w.slots == 1 ? 1 : workers;
    const int most = std::min(kMaxRows, rows_);
    panels_ = scratch.take_each<float>(packers, packed_ * most);
    row_ = scratch.take_each<float>(workers, w.k);
  }

  void run() {
    if (reference_) {
      reference::quantized_matvec(w_, x_, y_);
    } else {
      run_stages(workers_);
    }
  }

  // For each block of rows of x, packing and multiplying.
  int stages() const override {
    return alone() ? 2 * ((rows_ + kMaxRows - 1) / kMaxRows) : 1;
  }

  Stage begin(int stage) override {
    if (!alone()) {
      return {w_.slots, static_cast<double>(w_.n) * w_.k * all_};
    }
    if (stage % 2 == 0) {
      first_row_ = stage / 2 * kMaxRows;
      count_ = std::min(kMaxRows, rows_ - first_row_);
      return begin_pack();
    }
    tile_ = tile_rows(w_.n, w_.k, 1, workers_);
    return {
        (w_.n + tile_ - 1) / tile_, static_cast<double>(w_.n) * w_.k * count_};
  }

  void tile(int stage, int number, int worker) override {
    if (!alone()) {
      return head(number, worker);
    }
    if (stage % 2 == 0) {
      return pack(0, first_row_, number * kWidth, count_, panels_[0], worker);
    }
    const int first = number * tile_;
    const int rows = std::min(tile_, w_.n - first);
    multiply(0, first_row_, count_, first, rows, panels_[0]);
  }

 private:
  bool alone() const {
    return w_.slots == 1;
  }

  Stage begin_pack() const {
    const int values = count_ * w_.k, tiles = (count_ + kWidth - 1) / kWidth;
    if (tiles > 1 && values >= kFewValues) {
      return {tiles, 4.0 * values};
    }
    for (int i = 0; i < tiles; i++) {
      pack(0, first_row_, i * kWidth, count_, panels_[0], 0);
    }
    return {0, 0};
  }

  void head(int number, int worker) const {
    for (int begin = 0; begin < rows_; begin += kMaxRows) {
      const int count = std::min(kMaxRows, rows_ - begin);
      for (int i = 0; i < count; i += kWidth) {
        pack(number, begin, i, count, panels_[worker], worker);
      }
      for (int first = 0; first < w_.n; first += kMaxTileRows) {
        const int rows = std::min(kMaxTileRows, w_.n - first);
        multiply(number, begin, count, first, rows, panels_[worker]);
      }
    }
  }

  // Returns where row i of head h lies in x and y.
  size_t row_of(int h, int i) const {
    const int b = i / per_head_, m = i % per_head_;
    return (static_cast<size_t>(b) * w_.slots + h) * per_head_ + m;
  }

  // Packs rows [begin, begin + kWidth) of the `count` rows of x from
  // `first_row` on; the last ones go to narrower panels.
  void pack(
      int h,
      int first_row,
      int begin,
      int count,
      float* panels,
      int worker) const {
    float* row = row_[worker];
    for (const int end = std::min(begin + kWidth, count); begin < end;) {
      const int width = panel_width(end - begin);
      for (int m = 0; m < width; m++) {
        load_row(x_, row_of(h, first_row + begin + m), w_.k, row);
        w_.kernel->pack(row, w_.k, panels + packed_ * begin, m, width);
      }
      begin += width;
    }
  }

  // Multiplies rows [first, first + rows) of W of a head by packed rows of x.
  void multiply(
      int h,
      int first_row,
      int count,
      int first,
      int rows,
      const float* panels) const {
    float out[kMaxRows * kMaxTileRows];
    for (int begin = 0; begin < count;) {
      const int width = panel_width(count - begin);
      const int together = width == kWidth ? (count - begin) / kWidth : 1;
      const float* at[kMaxPanels];
      for (int i = 0; i < together; i++) {
        at[i] = panels + packed_ * (begin + i * width);
      }
      w_.dot(h, first, rows, std::span(at, together), width, out);
      for (int m = 0; m < together * width; m++) {
        const size_t to = row_of(h, first_row + begin + m) * w_.n + first;
        store_row(y_, to, out + m * rows, rows);
      }
      begin += together * width;
    }
  }

  const Matrix w_;
  const bool reference_;
  const mx::array& x_;
  mx::array& y_;
  const int workers_, per_head_;
  const size_t all_;
  const int rows_;
  const size_t packed_;
  Shares<float> panels_, row_;
  int first_row_ = 0, count_ = 0, tile_ = 0;  // of the stage at hand
};

}  // namespace

}  // namespace cpu

void QuantizedMatvec::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
    size_t next = 1;
    const cpu::Matrix w(in, next, format_, in[0].shape(-1));
    return cpu::Matvec(w, reference_, in[0], out[0], scratch, n);
  };
  cpu::dispatch(*this, inputs, outputs, make, reference_);
}

}  // namespace glm_fused
