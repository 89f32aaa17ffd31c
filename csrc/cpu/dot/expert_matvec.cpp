#include <algorithm>
#include <numeric>

#include "checks.h"
#include "cpu/dot/panels.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "reference/reference.h"

namespace glm_fused {

namespace cpu {

namespace {

// This many tokens are taken together, which bounds the scratch memory.
constexpr int kMaxTokens = 512;

// Computes y[t, i] = W[slots[t, i]] x[t], or x[t, i] where each choice has its
// own. Stages alternate: vectors are packed in panels of one slot, and met by
// the rows of its matrix.
class ExpertMatvec : public Staged {
 public:
  ExpertMatvec(
      const Matrix& w,
      bool reference,
      const mx::array& x,
      const mx::array& slots,
      mx::array& y,
      Scratch& scratch,
      int workers)
      : w_(w),
        reference_(reference),
        x_(x),
        slots_(slots),
        y_(y),
        workers_(workers),
        top_k_(slots.shape(1)),
        most_(std::min(kMaxTokens, slots.shape(0)) * top_k_),
        packed_(w.kernel->packed_floats(w.k)),
        panels_(most_, top_k_, scratch),
        all_(scratch.take<int>(most_)),
        groups_(scratch.take<int>(most_ + 1)),
        vectors_(scratch.take<float>(packed_ * most_)),
        row_(scratch.take_each<float>(workers, w.k)) {}

  void run() {
    if (reference_) {
      reference::expert_matvec(w_, x_, slots_, y_);
    } else {
      run_stages(workers_);
    }
  }

  int stages() const override {
    return 2 * ((slots_.shape(0) + kMaxTokens - 1) / kMaxTokens);
  }

  Stage begin(int stage) override {
    return stage % 2 == 0 ? begin_pack(stage / 2 * kMaxTokens) : begin_rows();
  }

  void tile(int stage, int number, int worker) override {
    if (stage % 2 == 0) {
      pack(number, worker);
    } else {
      multiply(number);
    }
  }

 private:
  Stage begin_pack(int first_token) {
    const int tokens = std::min(kMaxTokens, slots_.shape(0) - first_token);
    first_ = first_token * top_k_;
    pairs_ = tokens * top_k_;
    panels_.group(slots_.data<int32_t>() + first_, pairs_);
    std::iota(all_.begin(), all_.begin() + panels_.count(), 0);
    return {panels_.count(), 4.0 * pairs_ * w_.k};
  }

  // Panels of one slot that a row meets together are a group.
  Stage begin_rows() {
    const auto panels = all_.first(panels_.count());
    group_count_ = 0;
    for (size_t at = 0; at < panels.size();) {
      groups_[group_count_++] = static_cast<int>(at);
      at += panels_.together(panels.subspan(at));
    }
    groups_[group_count_] = panels_.count();
    rows_ = tile_rows(w_.n, w_.k, group_count_, workers_);
    tiles_ = (w_.n + rows_ - 1) / rows_;
    return {tiles_ * group_count_, static_cast<double>(w_.n) * w_.k * pairs_};
  }

  void pack(int panel, int worker) {
    const auto pairs = panels_.pairs(panel);
    const int width = panels_[panel].width;
    for (int m = 0; m < width; m++) {
      const size_t pair = first_ + pairs[m];
      const size_t row = x_.ndim() == 2 ? pair / top_k_ : pair;
      load_row(x_, row, w_.k, row_[worker]);
      w_.kernel->pack(row_[worker], w_.k, vectors(panel), m, width);
    }
  }

  void multiply(int number) {
    const int group = number / tiles_, first = number % tiles_ * rows_;
    const int rows = std::min(rows_, w_.n - first);
    const int begin = groups_[group], end = groups_[group + 1];
    const float* at[kMaxPanels];
    for (int i = begin; i < end; i++) {
      at[i - begin] = vectors(i);
    }
    const auto [slot, place, width] = panels_[begin];
    float out[kMaxPanels * 8 * kMaxTileRows];
    w_.dot(slot, first, rows, std::span(at, end - begin), width, out);
    const float* values = out;
    for (int i = begin; i < end; i++) {
      for (int pair : panels_.pairs(i)) {
        const size_t row = first_ + pair;
        store_row(y_, row * w_.n + first, values, rows);
        values += rows;
      }
    }
  }

  float* vectors(int panel) {
    return vectors_.data() + packed_ * panels_[panel].first;
  }

  const Matrix w_;
  const bool reference_;
  const mx::array &x_, &slots_;
  mx::array& y_;
  const int workers_, top_k_;
  const int most_;  // pairs of a chunk
  const size_t packed_;
  Panels panels_;
  const std::span<int> all_, groups_;
  const std::span<float> vectors_;
  const Shares<float> row_;
  size_t first_ = 0;                                        // pair of the chunk
  int pairs_ = 0, group_count_ = 0, rows_ = 0, tiles_ = 0;  // of the chunk
};

}  // namespace

}  // namespace cpu

void ExpertMatvec::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!known_slots_) {
    cpu::evaluate(*this, [&] {
      cpu::wait_for(inputs[1], stream());
      check_slots(name_of_op, inputs[1], inputs[2].shape(0));
    });
  }
  const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
    size_t next = 2;
    const cpu::Matrix w(in, next, format_, in[0].shape(-1));
    return cpu::ExpertMatvec(w, reference_, in[0], in[1], out[0], scratch, n);
  };
  cpu::dispatch(*this, inputs, outputs, make, reference_);
}

}  // namespace glm_fused
