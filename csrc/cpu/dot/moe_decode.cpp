#include "cpu/dot/moe_decode.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "checks.h"
#include "cpu/dot/panels.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "reference/reference.h"
#include "rounding.h"

namespace glm_fused {

namespace cpu {

namespace {

// This many tokens are taken together, which bounds the scratch memory of a
// long prefill.
constexpr int kMaxTokens = 256;
// A task holds kMaxValues of the choices' outputs, or more where there are so
// many choices that kMinTile rows of each are more.
constexpr int kMaxValues = 1 << 16, kMinTile = 32;

class Fused {
 public:
  Fused(const Moe& moe, bool arrivals, Scratch& scratch, int workers)
      : moe_(moe),
        top_k_(moe.slots.shape(1)),
        workers_(workers),
        same_pack_(moe.up.kernel->pack == moe.gate.kernel->pack),
        most_(std::min(kMaxTokens, moe.x.shape(0)) * top_k_),
        panels_(most_, top_k_, scratch),
        batch_(scratch.take<int>(most_)),
        gate_inputs_(scratch.take<const float*>(most_)),
        up_inputs_(scratch.take<const float*>(most_)),
        row_(scratch.take<float>(moe.gate.k)),
        gate_packed_(scratch.take<float>(packed(moe.gate) * most_)),
        up_packed_(
            scratch.take<float>(same_pack_ ? 0 : packed(moe.up) * most_)),
        act_(scratch.take<float>(static_cast<size_t>(most_) * moe.gate.n)),
        down_packed_(scratch.take<float>(packed(moe.down) * most_)),
        y_(scratch.take<float>(
            arrivals ? static_cast<size_t>(most_) * moe.down.n : 0)),
        tile_y_(scratch.take_each<float>(workers, most_tile_values())) {}

  // With `arrivals`, experts are computed as they come.
  void run(Arrivals* arrivals) {
    const int tokens = moe_.x.shape(0);
    for (first_ = 0; first_ < tokens; first_ += kMaxTokens) {
      tokens_ = std::min(kMaxTokens, tokens - first_);
      run_chunk(arrivals);
    }
  }

 private:
  using Batch = std::span<const int>;  // numbers of panels

  static size_t packed(const Matrix& w) {
    return w.kernel->packed_floats(w.k);
  }

  size_t most_tile_values() const {
    const size_t pairs = most_, n = moe_.down.n;
    const size_t most = std::max<size_t>(kMaxValues, pairs * kMinTile);
    return std::min({pairs * kMaxTileRows, most, pairs * n});
  }

  void run_chunk(Arrivals* arrivals) {
    const int* slots = moe_.slots.data<int32_t>() + first_ * top_k_;
    panels_.group(slots, tokens_ * top_k_);
    pack_inputs();
    if (!arrivals) {
      const Batch all = all_panels();
      project(all);
      down_sum(all);
      return;
    }
    std::vector<int> pending = distinct_slots();
    Batch batch = take(*arrivals, pending);
    if (pending.empty()) {
      project(batch);
      down_sum(batch);
      return;
    }
    while (true) {
      project(batch);
      down(batch);
      if (pending.empty()) {
        break;
      }
      batch = take(*arrivals, pending);
    }
    sum();
  }

  Batch all_panels() const {
    const auto all = batch_.first(panels_.count());
    std::iota(all.begin(), all.end(), 0);
    return all;
  }

  std::vector<int> distinct_slots() const {
    std::vector<int> slots;
    for (int i = 0; i < panels_.count(); i++) {
      if (slots.empty() || slots.back() != panels_[i].slot) {
        slots.push_back(panels_[i].slot);
      }
    }
    return slots;
  }

  Batch take(Arrivals& arrivals, std::vector<int>& pending) const {
    const std::vector<int> slots = arrivals.take(pending);
    int count = 0;
    for (int i = 0; i < panels_.count(); i++) {
      if (std::ranges::find(slots, panels_[i].slot) != slots.end()) {
        batch_[count++] = i;
      }
    }
    return batch_.first(count);
  }

  double work(Batch batch, int matrices) const {
    int pairs = 0;
    for (int i : batch) {
      pairs += panels_[i].width;
    }
    return static_cast<double>(moe_.gate.n) * moe_.gate.k * matrices * pairs;
  }

  // Packs x for all panels. Those over the same tokens share it, which are all
  // of them where there is one token.
  void pack_inputs() {
    const Matrix &gate = moe_.gate, &up = moe_.up;
    float *g = gate_packed_.data(), *u = up_packed_.data();
    panels_.each_twin([&](int i, int twin) {
      if (twin == i) {
        const auto pairs = panels_.pairs(i);
        const int width = panels_[i].width;
        for (int m = 0; m < width; m++) {
          const int token = first_ + panels_.token(pairs[m]);
          load_row(moe_.x, token, gate.k, row_.data());
          gate.kernel->pack(row_.data(), gate.k, g, m, width);
          if (!same_pack_) {
            up.kernel->pack(row_.data(), up.k, u, m, width);
          }
        }
        gate_inputs_[i] = g;
        up_inputs_[i] = same_pack_ ? g : u;
        g += packed(gate) * width;
        u += same_pack_ ? 0 : packed(up) * width;
      }
      gate_inputs_[i] = gate_inputs_[twin];
      up_inputs_[i] = up_inputs_[twin];
    });
  }

  // Computes all but the down projection.
  void project(Batch batch) const {
    gate_up(batch);
    pack_activations(batch);
  }

  void gate_up(Batch batch) const {
    const int count = static_cast<int>(batch.size());
    const int n = moe_.gate.n, tile = tile_rows(n, count, workers_);
    const int tiles = (n + tile - 1) / tile;
    const auto task = [&](int t) {
      const int i = batch[t / tiles];
      const auto [slot, at, width] = panels_[i];
      const int first = t % tiles * tile, rows = std::min(tile, n - first);
      float gate[8 * kMaxTileRows], up[8 * kMaxTileRows];
      moe_.gate.dot(slot, first, rows, gate_inputs_[i], width, gate);
      moe_.up.dot(slot, first, rows, up_inputs_[i], width, up);
      for (int m = 0; m < width; m++) {
        kernels().swiglu(
            gate + m * rows,
            up + m * rows,
            act(panels_.pairs(i)[m]) + first,
            rows,
            moe_.type);
      }
    };
    parallel_for(count * tiles, task, work(batch, 2), workers_);
  }

  float* act(int pair) const {
    return act_.data() + static_cast<size_t>(pair) * moe_.gate.n;
  }

  float* down_input(int i) const {
    return down_packed_.data() + packed(moe_.down) * panels_[i].first;
  }

  void pack_activations(Batch batch) const {
    const Matrix& down = moe_.down;
    const auto task = [&](int b) {
      const int i = batch[b], width = panels_[i].width;
      for (int m = 0; m < width; m++) {
        const float* from = act(panels_.pairs(i)[m]);
        down.kernel->pack(from, down.k, down_input(i), m, width);
      }
    };
    const int count = static_cast<int>(batch.size());
    parallel_for(count, task, work(batch, 2), workers_);
  }

  // Computes rows of y for the pairs of panel i, one pair every `stride`
  // values; each projection is rounded as the unfused chain stores it.
  void down_rows(int i, int first, int rows, float* y, size_t stride) const {
    const auto [slot, at, width] = panels_[i];
    float out[8 * kMaxTileRows];
    moe_.down.dot(slot, first, rows, down_input(i), width, out);
    for (int m = 0; m < width; m++) {
      float* to = y + panels_.pairs(i)[m] * stride;
      for (int r = 0; r < rows; r++) {
        to[r] = round_to(out[m * rows + r], moe_.type);
      }
    }
  }

  // Sums the choices of each token, in order, with one rounding per multiply
  // and per add.
  void sum_rows(int first, int rows, const float* y, size_t stride) const {
    const float* scores = moe_.scores.data<float>() + first_ * top_k_;
    for (int token = 0; token < tokens_; token++) {
      float sum[kMaxTileRows] = {};
      for (int j = token * top_k_; j < (token + 1) * top_k_; j++) {
        for (int r = 0; r < rows; r++) {
          const float term = y[j * stride + r] * scores[j];
          sum[r] = sum[r] + term;
        }
      }
      const size_t row = static_cast<size_t>(first_ + token);
      store_row(moe_.y, row * moe_.down.n + first, sum, rows);
    }
  }

  // Computes y_ [pair, n] for the batch.
  void down(Batch batch) const {
    const int count = static_cast<int>(batch.size());
    const int n = moe_.down.n, tile = tile_rows(n, count, workers_);
    const int tiles = (n + tile - 1) / tile;
    const auto task = [&](int t) {
      const int first = t % tiles * tile, rows = std::min(tile, n - first);
      down_rows(batch[t / tiles], first, rows, y_.data() + first, n);
    };
    parallel_for(count * tiles, task, work(batch, 1), workers_);
  }

  void sum() const {
    const int n = moe_.down.n, tile = tile_rows(n, 1, workers_);
    const auto task = [&](int t) {
      const int first = t * tile;
      sum_rows(first, std::min(tile, n - first), y_.data() + first, n);
    };
    const double work = static_cast<double>(n) * tokens_ * top_k_;
    parallel_for((n + tile - 1) / tile, task, work, workers_);
  }

  // Computes `down` and the sum of all panels, a tile of rows at a time, so
  // that the choices' outputs stay in a core's L2 cache.
  void down_sum(Batch all) const {
    const int n = moe_.down.n, count = static_cast<int>(all.size());
    const int most = std::max(kMinTile, kMaxValues / (tokens_ * top_k_));
    const int tile = std::min(tile_rows(n, count, workers_), most);
    const auto task = [&](int t, int worker) {
      const int first = t * tile, rows = std::min(tile, n - first);
      for (int i : all) {
        down_rows(i, first, rows, tile_y_[worker], rows);
      }
      sum_rows(first, rows, tile_y_[worker], rows);
    };
    parallel_for((n + tile - 1) / tile, task, work(all, 1), workers_);
  }

  const Moe moe_;
  const int top_k_, workers_;
  const bool same_pack_;
  const int most_;  // pairs of a chunk
  int first_ = 0, tokens_ = 0;
  Panels panels_;
  const std::span<int> batch_;
  const std::span<const float*> gate_inputs_, up_inputs_;  // by panel
  const std::span<float> row_, gate_packed_, up_packed_;
  const std::span<float> act_;  // [pair, intermediate]
  const std::span<float> down_packed_, y_;
  const Shares<float> tile_y_;
};

class Decode {
 public:
  Decode(
      const Moe& moe,
      bool reference,
      std::shared_ptr<Arrivals> arrivals,
      Scratch& scratch,
      int workers)
      : moe_(moe),
        reference_(reference),
        arrivals_(std::move(arrivals)),
        fused_(moe, arrivals_ != nullptr, scratch, workers) {}

  void run() {
    if (!arrivals_) {
      compute();
      return;
    }
    try {
      // The slots may become others than MLX's array says so far.
      mx::array slots = moe_.slots;
      if (!arrivals_->begin(slots.data<int32_t>(), slots.size())) {
        fill_with_nan();
        return;
      }
      check_slots(slots, moe_.gate.slots);
      compute();
      arrivals_->end();
    } catch (const std::exception& error) {
      // MLX goes on with what was enqueued, and keeps what is in y: it must
      // not pass for a result.
      fill_with_nan();
      arrivals_->failed(error);
    }
  }

 private:
  void compute() {
    if (!reference_) {
      fused_.run(arrivals_.get());
      return;
    }
    if (arrivals_) {
      wait_for_all();
    }
    reference::moe_decode(moe_);
  }

  void wait_for_all() const {
    const int32_t* slots = moe_.slots.data<int32_t>();
    std::vector<int> pending(slots, slots + moe_.slots.size());
    while (!pending.empty()) {
      arrivals_->take(pending);
    }
  }

  // Fills y with NaN, which all bits set are in every type of activations.
  void fill_with_nan() const {
    std::memset(moe_.y.data<std::byte>(), 0xff, moe_.y.nbytes());
  }

  const Moe moe_;
  const bool reference_;
  const std::shared_ptr<Arrivals> arrivals_;
  Fused fused_;
};

}  // namespace

}  // namespace cpu

void MoeDecode::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!known_slots_) {
    cpu::evaluate(*this, [&] {
      cpu::wait_for(inputs[1], stream());
      check_slots(inputs[1], inputs[3].shape(0));
    });
  }
  const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
    size_t next = 3;
    const cpu::Matrix gate(in, next, gate_, in[0].shape(1));
    const cpu::Matrix up(in, next, up_, in[0].shape(1));
    const cpu::Matrix down(in, next, down_, gate.n);
    const FloatType type = float_type_of(out[0].dtype());
    const cpu::Moe moe{in[0], in[1], in[2], gate, up, down, out[0], type};
    return cpu::Decode(moe, reference_, arrivals_, scratch, n);
  };
  cpu::dispatch(*this, inputs, outputs, make, reference_);
}

}  // namespace glm_fused
