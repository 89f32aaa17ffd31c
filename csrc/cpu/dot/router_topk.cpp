#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "checks.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "reference/reference.h"
#include "swiglu.h"

namespace glm_fused {

namespace cpu {

namespace {

// Chooses the experts of one token after the other.
class Selection {
 public:
  Selection(const Routing& routing, int experts, Scratch& scratch)
      : r_(routing),
        weight_(scratch.take<float>(experts)),
        biased_(scratch.take<float>(experts)),
        worth_(scratch.take<float>(routing.n_group)),
        kept_(scratch.take<bool>(routing.n_group)),
        order_(scratch.take<int>(std::max(experts, routing.n_group))) {}

  void select(
      const float* logits,
      const float* bias,
      int32_t* chosen,
      float* scores) const {
    for (size_t e = 0; e < weight_.size(); e++) {
      weight_[e] = sigmoid(logits[e], FloatType::float32);
      biased_[e] = weight_[e] + bias[e];
    }
    keep_groups();
    const auto order = best(biased_, r_.top_k);
    float total = 0;
    for (int j = 0; j < r_.top_k; j++) {
      chosen[j] = order[j];
      scores[j] = weight_[order[j]];
      total = total + scores[j];
    }
    total = total + 1e-20f;
    for (int j = 0; j < r_.top_k; j++) {
      const float share = r_.norm_topk_prob ? scores[j] / total : scores[j];
      scores[j] = share * r_.routed_scaling_factor;
    }
  }

 private:
  // Returns the `count` best of `scores`, best first, valid until the next
  // call. The lowest index wins a tie, and NaN loses to everything.
  std::span<const int> best(std::span<const float> scores, int count) const {
    const auto order = order_.first(scores.size());
    std::iota(order.begin(), order.end(), 0);
    const auto key = [&](int i) {
      return std::isnan(scores[i]) ? -std::numeric_limits<float>::infinity()
                                   : scores[i];
    };
    std::partial_sort(
        order.begin(), order.begin() + count, order.end(), [&](int a, int b) {
          return key(a) != key(b) ? key(a) > key(b) : a < b;
        });
    return order.first(count);
  }

  // Sets the scores of all but the best groups to -inf; a group is worth the
  // sum of its two best scores.
  void keep_groups() const {
    if (r_.n_group == 1) {
      return;
    }
    const size_t size = biased_.size() / r_.n_group;
    for (int g = 0; g < r_.n_group; g++) {
      const auto group = biased_.subspan(g * size, size);
      const auto top = best(group, 2);
      worth_[g] = group[top[0]] + group[top[1]];
    }
    std::fill(kept_.begin(), kept_.end(), false);
    for (int g : best(worth_, r_.topk_group)) {
      kept_[g] = true;
    }
    for (size_t i = 0; i < biased_.size(); i++) {
      if (!kept_[i / size]) {
        biased_[i] = -std::numeric_limits<float>::infinity();
      }
    }
  }

  const Routing r_;
  const std::span<float> weight_, biased_, worth_;
  const std::span<bool> kept_;
  const std::span<int> order_;
};

class Router : public Staged {
 public:
  Router(
      const Matrix& w,
      const Routing& routing,
      bool reference,
      const mx::array& x,
      const mx::array& bias,
      mx::array& experts,
      mx::array& scores,
      Scratch& scratch,
      int workers)
      : w_(w),
        reference_(reference),
        workers_(workers),
        x_(x),
        bias_(bias),
        experts_(experts),
        scores_(scores),
        packed_(w.kernel->packed_floats(w.k)),
        selection_(routing, w.n, scratch),
        logits_(scratch.take<float>(static_cast<size_t>(tokens()) * w.n)),
        panel_(scratch.take<float>(packed_ * kMaxWidth)),
        row_(scratch.take<float>(w.k)) {}

  void run() {
    if (reference_) {
      reference::router_logits(w_, x_, logits_.data());
      select();
    } else {
      run_stages(workers_);
    }
  }

  int stages() const override {
    return (tokens() + kMaxWidth - 1) / kMaxWidth + 1;
  }

  Stage begin(int stage) override {
    first_ = stage * kMaxWidth;
    if (stage + 1 == stages()) {
      return {1, 0};
    }
    const int count = std::min(kMaxWidth, tokens() - first_);
    for (int at = 0; at < count;) {
      const int width = panel_width(count - at);
      for (int m = 0; m < width; m++) {
        load_row(x_, first_ + at + m, w_.k, row_.data());
        w_.kernel->pack(
            row_.data(), w_.k, panel_.data() + packed_ * at, m, width);
      }
      at += width;
    }
    tile_ = tile_rows(w_.n, w_.k, 1, workers_);
    return {
        (w_.n + tile_ - 1) / tile_, static_cast<double>(w_.n) * w_.k * count};
  }

  void tile(int stage, int number, int) override {
    if (stage + 1 == stages()) {
      select();
    } else {
      find_logits(number * tile_);
    }
  }

 private:
  static constexpr int kMaxWidth = 8;  // so many tokens make a stage

  int tokens() const {
    return x_.shape(0);
  }

  // Computes a tile of the logits of this stage's tokens.
  void find_logits(int first) const {
    const int rows = std::min(tile_, w_.n - first);
    const int count = std::min(kMaxWidth, tokens() - first_);
    float out[kMaxWidth * kMaxTileRows];
    for (int at = 0; at < count;) {
      const int width = panel_width(count - at);
      const float* panel = panel_.data() + packed_ * at;
      w_.dot(0, first, rows, {&panel, 1}, width, out);
      for (int m = 0; m < width; m++) {
        const size_t row = static_cast<size_t>(first_ + at + m) * w_.n;
        std::copy_n(out + m * rows, rows, logits_.data() + row + first);
      }
      at += width;
    }
  }

  void select() const {
    const size_t top_k = experts_.shape(1);
    for (int t = 0; t < tokens(); t++) {
      selection_.select(
          logits_.data() + static_cast<size_t>(t) * w_.n,
          bias_.data<float>(),
          experts_.data<int32_t>() + t * top_k,
          scores_.data<float>() + t * top_k);
    }
  }

  const Matrix w_;
  const bool reference_;
  const int workers_;
  const mx::array &x_, &bias_;
  mx::array &experts_, &scores_;
  const size_t packed_;
  const Selection selection_;
  const std::span<float> logits_, panel_, row_;
  int first_ = 0, tile_ = 0;  // of the stage at hand
};

}  // namespace

}  // namespace cpu

void RouterTopk::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
    const Format format = dense_format(float_type_of(in[1].dtype()));
    size_t next = 1;
    const cpu::Matrix w(in, next, format, in[0].shape(-1));
    return cpu::Router(
        w, routing_, reference_, in[0], in[2], out[0], out[1], scratch, n);
  };
  cpu::dispatch(*this, inputs, outputs, make, reference_);
}

}  // namespace glm_fused
