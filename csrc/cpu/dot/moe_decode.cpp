#include "cpu/dot/moe_decode.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>

#include "checks.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/thread_pool.h"
#include "primitives.h"
#include "reference/reference.h"
#include "rounding.h"

namespace glm_fused {

namespace cpu {

namespace {

// Tokens taken together: bounds the scratch memory of a long prefill.
constexpr int kMaxTokens = 256;

// Up to eight (token, choice) pairs that share a slot. Pair p of a chunk is
// token p / top_k, choice p % top_k.
struct Panel {
  int slot;
  std::vector<int> pairs;
  int width() const {
    return static_cast<int>(pairs.size());
  }
};

std::vector<Panel> group_by_slot(const int32_t* slots, int pairs) {
  std::map<int, std::vector<int>> by_slot;
  for (int p = 0; p < pairs; p++) {
    by_slot[slots[p]].push_back(p);
  }
  std::vector<Panel> panels;
  for (const auto& [slot, list] : by_slot) {
    for (auto at = list.begin(); at != list.end();) {
      const int width = panel_width(static_cast<int>(list.end() - at));
      panels.push_back({slot, {at, at + width}});
      at += width;
    }
  }
  return panels;
}

class Chunk {
 public:
  Chunk(const Moe& moe, int first_token, int tokens)
      : moe_(moe),
        first_(first_token),
        tokens_(tokens),
        top_k_(moe.slots.shape(1)),
        slots_(moe.slots.data<int32_t>() + first_token * top_k_),
        panels_(group_by_slot(slots_, tokens * top_k_)),
        act_(uninitialized(static_cast<size_t>(tokens) * top_k_ * moe.gate.n)) {
  }

  // With `arrivals`, experts are computed as they come.
  void run(Arrivals* arrivals) {
    pack_inputs();
    down_inputs_.resize(panels_.size());
    std::vector<int> pending = distinct_slots();
    Panels batch = arrivals ? take(*arrivals, pending) : all_panels();
    if (batch.size() == panels_.size()) {
      project(batch);
      down_sum(batch);
      return;
    }
    const Floats y =
        uninitialized(static_cast<size_t>(tokens_) * top_k_ * moe_.down.n);
    while (true) {
      project(batch);
      down(batch, y.get());
      if (pending.empty()) {
        break;
      }
      batch = take(*arrivals, pending);
    }
    sum(y.get());
  }

 private:
  using Panels = std::vector<int>;  // indices

  Panels all_panels() const {
    Panels all(panels_.size());
    std::iota(all.begin(), all.end(), 0);
    return all;
  }

  std::vector<int> distinct_slots() const {
    std::vector<int> slots;
    for (const auto& panel : panels_) {
      if (slots.empty() || slots.back() != panel.slot) {
        slots.push_back(panel.slot);
      }
    }
    return slots;
  }

  Panels take(Arrivals& arrivals, std::vector<int>& pending) const {
    const std::vector<int> slots = arrivals.take(pending);
    Panels panels = all_panels();
    std::erase_if(panels, [&](int i) {
      return std::ranges::find(slots, panels_[i].slot) == slots.end();
    });
    return panels;
  }

  double work(const Panels& batch, int matrices) const {
    int pairs = 0;
    for (int i : batch) {
      pairs += panels_[i].width();
    }
    return static_cast<double>(moe_.gate.n) * moe_.gate.k * matrices * pairs;
  }

  // Panels over the same tokens share their packed x: with one token, all.
  void pack_inputs() {
    std::map<std::vector<int>, std::pair<const float*, const float*>> packed;
    const Floats row = uninitialized(moe_.gate.k);
    for (const auto& panel : panels_) {
      std::vector<int> tokens;
      for (int pair : panel.pairs) {
        tokens.push_back(pair / top_k_);
      }
      auto& [gate, up] = packed[tokens];
      if (gate == nullptr) {
        float* g = allocate(moe_.gate, panel.width());
        const bool same = moe_.up.kernel->pack == moe_.gate.kernel->pack;
        float* u = same ? g : allocate(moe_.up, panel.width());
        for (int m = 0; m < panel.width(); m++) {
          load_row(moe_.x, first_ + tokens[m], moe_.gate.k, row.get());
          moe_.gate.kernel->pack(row.get(), moe_.gate.k, g, m, panel.width());
          if (!same) {
            moe_.up.kernel->pack(row.get(), moe_.up.k, u, m, panel.width());
          }
        }
        gate = g;
        up = u;
      }
      inputs_.push_back({gate, up});
    }
  }

  float* allocate(const Matrix& w, int width) {
    scratch_.push_back(uninitialized(w.kernel->packed_floats(w.k) * width));
    return scratch_.back().get();
  }

  // All but the down projection.
  void project(const Panels& batch) {
    gate_up(batch);
    pack_activations(batch);
  }

  void gate_up(const Panels& batch) {
    const int count = static_cast<int>(batch.size());
    const int n = moe_.gate.n, tile = tile_rows(n, count);
    const int tiles = (n + tile - 1) / tile;
    const auto task = [&](int t) {
      const int i = batch[t / tiles];
      const auto& panel = panels_[i];
      const auto [gate_x, up_x] = inputs_[i];
      const int first = t % tiles * tile, rows = std::min(tile, n - first);
      const int width = panel.width();
      float gate[8 * kMaxTileRows], up[8 * kMaxTileRows];
      moe_.gate.dot(panel.slot, first, rows, gate_x, width, gate);
      moe_.up.dot(panel.slot, first, rows, up_x, width, up);
      for (int m = 0; m < width; m++) {
        float* act = act_.get() + static_cast<size_t>(panel.pairs[m]) * n;
        kernels().swiglu(
            gate + m * rows, up + m * rows, act + first, rows, moe_.type);
      }
    };
    parallel_for(count * tiles, task, work(batch, 2));
  }

  void pack_activations(const Panels& batch) {
    const Matrix& down = moe_.down;
    for (int i : batch) {
      down_inputs_[i] = allocate(down, panels_[i].width());
    }
    const auto task = [&](int b) {
      const int i = batch[b];
      const auto& panel = panels_[i];
      for (int m = 0; m < panel.width(); m++) {
        const float* act =
            act_.get() + static_cast<size_t>(panel.pairs[m]) * down.k;
        down.kernel->pack(act, down.k, down_inputs_[i], m, panel.width());
      }
    };
    parallel_for(static_cast<int>(batch.size()), task, work(batch, 2));
  }

  // Rows of y, [pair] every `stride` values; each projection is rounded as the
  // unfused chain stores it.
  void down_rows(int i, int first, int rows, float* y, size_t stride) const {
    const auto& panel = panels_[i];
    float out[8 * kMaxTileRows];
    moe_.down.dot(panel.slot, first, rows, down_inputs_[i], panel.width(), out);
    for (int m = 0; m < panel.width(); m++) {
      float* to = y + panel.pairs[m] * stride;
      for (int r = 0; r < rows; r++) {
        to[r] = round_to(out[m * rows + r], moe_.type);
      }
    }
  }

  // A token's choices are summed in order, one rounding per multiply and per
  // add.
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

  // y [pair, n] of the batch.
  void down(const Panels& batch, float* y) const {
    const int count = static_cast<int>(batch.size());
    const int n = moe_.down.n, tile = tile_rows(n, count);
    const int tiles = (n + tile - 1) / tile;
    const auto task = [&](int t) {
      const int first = t % tiles * tile, rows = std::min(tile, n - first);
      down_rows(batch[t / tiles], first, rows, y + first, n);
    };
    parallel_for(count * tiles, task, work(batch, 1));
  }

  void sum(const float* y) const {
    const int n = moe_.down.n, tile = tile_rows(n, 1);
    const auto task = [&](int t) {
      const int first = t * tile;
      sum_rows(first, std::min(tile, n - first), y + first, n);
    };
    parallel_for(
        (n + tile - 1) / tile, task, static_cast<double>(n) * tokens_ * top_k_);
  }

  // `down` of all panels, then `sum`, a tile of rows at a time: the choices'
  // outputs stay in a core's L2 cache.
  void down_sum(const Panels& all) const {
    constexpr int kMaxValues = 1 << 16;
    const int n = moe_.down.n;
    const int most = std::max(32, kMaxValues / (tokens_ * top_k_));
    const int count = static_cast<int>(all.size());
    const int tile = std::min(tile_rows(n, count), most);
    const auto task = [&](int t) {
      const int first = t * tile, rows = std::min(tile, n - first);
      const Floats y =
          uninitialized(static_cast<size_t>(tokens_) * top_k_ * rows);
      for (int i : all) {
        down_rows(i, first, rows, y.get(), rows);
      }
      sum_rows(first, rows, y.get(), rows);
    };
    parallel_for((n + tile - 1) / tile, task, work(all, 1));
  }

  const Moe& moe_;
  const int first_, tokens_, top_k_;
  const int32_t* slots_;
  const std::vector<Panel> panels_;  // by slot
  const Floats act_;                 // [pair, intermediate]
  std::vector<std::pair<const float*, const float*>> inputs_;  // gate, up
  std::vector<float*> down_inputs_;
  std::vector<Floats> scratch_;
};

void check_slots(const Moe& moe) {
  const int32_t* slots = moe.slots.data<int32_t>();
  for (size_t i = 0; i < moe.slots.size(); i++) {
    if (slots[i] < 0 || slots[i] >= moe.gate.slots) {
      invalid(
          "moe_decode",
          "slots[",
          i / moe.slots.shape(1),
          ", ",
          i % moe.slots.shape(1),
          "] must be in [0, ",
          moe.gate.slots,
          ") but is ",
          slots[i],
          ".");
    }
  }
}

// The slots may become others than MLX's array says so far.
bool begin(const Moe& moe, Arrivals& arrivals) {
  mx::array slots = moe.slots;
  return arrivals.begin(slots.data<int32_t>(), slots.size());
}

void wait_for_all(const Moe& moe, Arrivals& arrivals) {
  const int32_t* slots = moe.slots.data<int32_t>();
  std::vector<int> pending(slots, slots + moe.slots.size());
  while (!pending.empty()) {
    arrivals.take(pending);
  }
}

// Of any of the types that an activation has: all bits set is NaN.
void fill_with_nan(mx::array& y) {
  std::memset(y.data<std::byte>(), 0xff, y.nbytes());
}

}  // namespace

void moe_decode(const Moe& moe, Arrivals* arrivals) {
  const int tokens = moe.x.shape(0);
  for (int first = 0; first < tokens; first += kMaxTokens) {
    Chunk(moe, first, std::min(kMaxTokens, tokens - first)).run(arrivals);
  }
}

}  // namespace cpu

void MoeDecode::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto task = [gate_format = gate_,
                     up_format = up_,
                     down_format = down_,
                     reference = reference_,
                     arrivals = arrivals_](const auto& in, auto& out) {
    size_t next = 3;
    const cpu::Matrix gate(in, next, gate_format, in[0].shape(1));
    const cpu::Matrix up(in, next, up_format, in[0].shape(1));
    const cpu::Matrix down(in, next, down_format, gate.n);
    const FloatType type = float_type_of(out[0].dtype());
    const cpu::Moe moe{in[0], in[1], in[2], gate, up, down, out[0], type};
    const auto compute = [&](Arrivals* some) {
      cpu::check_slots(moe);
      if (!reference) {
        cpu::moe_decode(moe, some);
        return;
      }
      if (some) {
        cpu::wait_for_all(moe, *some);
      }
      reference::moe_decode(moe);
    };
    try {
      if (!arrivals) {
        compute(nullptr);
      } else if (cpu::begin(moe, *arrivals)) {
        compute(arrivals.get());
        arrivals->end();
      } else {
        cpu::fill_with_nan(out[0]);
      }
    } catch (const std::exception& error) {
      // MLX goes on with what was enqueued, and keeps the results: they must
      // not look like any.
      cpu::fill_with_nan(out[0]);
      if (!arrivals) {
        throw;
      }
      arrivals->failed(error);
    }
  };
  cpu::dispatch(*this, inputs, outputs, task);
}

}  // namespace glm_fused
