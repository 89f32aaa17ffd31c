#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "checks.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/thread_pool.h"
#include "primitives.h"
#include "reference/reference.h"
#include "swiglu.h"

namespace glm_fused {

namespace cpu {

namespace {

// The `count` best of `scores`, best first; the lowest index wins a tie, and
// NaN loses to everything.
std::vector<int> best(const std::vector<float>& scores, int count) {
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const auto key = [&](int i) {
    return std::isnan(scores[i]) ? -std::numeric_limits<float>::infinity()
                                 : scores[i];
  };
  std::partial_sort(
      order.begin(), order.begin() + count, order.end(), [&](int a, int b) {
        return key(a) != key(b) ? key(a) > key(b) : a < b;
      });
  order.resize(count);
  return order;
}

// Sets the scores of all but the best groups to -inf; a group is worth the sum
// of its two best scores.
void keep_groups(std::vector<float>& scores, const Routing& r) {
  if (r.n_group == 1) {
    return;
  }
  const int size = static_cast<int>(scores.size()) / r.n_group;
  std::vector<float> worth(r.n_group);
  for (int g = 0; g < r.n_group; g++) {
    std::vector<float> group(
        scores.begin() + g * size, scores.begin() + (g + 1) * size);
    const auto top = best(group, 2);
    worth[g] = group[top[0]] + group[top[1]];
  }
  std::vector<bool> kept(r.n_group, false);
  for (int g : best(worth, r.topk_group)) {
    kept[g] = true;
  }
  for (size_t i = 0; i < scores.size(); i++) {
    if (!kept[i / size]) {
      scores[i] = -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace

void select_experts(
    const float* logits,
    const float* bias,
    int experts,
    const Routing& r,
    int32_t* chosen,
    float* scores) {
  std::vector<float> weight(experts), biased(experts);
  for (int e = 0; e < experts; e++) {
    weight[e] = sigmoid(logits[e], FloatType::float32);
    biased[e] = weight[e] + bias[e];
  }
  keep_groups(biased, r);
  const auto order = best(biased, r.top_k);
  float total = 0;
  for (int j = 0; j < r.top_k; j++) {
    chosen[j] = order[j];
    scores[j] = weight[order[j]];
    total = total + scores[j];
  }
  total = total + 1e-20f;
  for (int j = 0; j < r.top_k; j++) {
    const float share = r.norm_topk_prob ? scores[j] / total : scores[j];
    scores[j] = share * r.routed_scaling_factor;
  }
}

void router_logits(const Matrix& w, const mx::array& x, float* logits) {
  const int tokens = x.shape(0);
  const size_t packed = w.kernel->packed_floats(w.k);
  const int tile = tile_rows(w.n, 1), tiles = (w.n + tile - 1) / tile;
  constexpr int kMaxWidth = 8;
  const Floats panel = uninitialized(packed * kMaxWidth);
  const Floats row = uninitialized(w.k);
  for (int begin = 0; begin < tokens;) {
    const int width = panel_width(tokens - begin);
    for (int m = 0; m < width; m++) {
      load_row(x, begin + m, w.k, row.get());
      w.kernel->pack(row.get(), w.k, panel.get(), m, width);
    }
    const auto task = [&](int t) {
      const int first = t * tile, rows = std::min(tile, w.n - first);
      float out[kMaxWidth * kMaxTileRows];
      w.dot(0, first, rows, panel.get(), width, out);
      for (int m = 0; m < width; m++) {
        std::copy_n(
            out + m * rows,
            rows,
            logits + static_cast<size_t>(begin + m) * w.n + first);
      }
    };
    parallel_for(tiles, task, static_cast<double>(w.n) * w.k * width);
    begin += width;
  }
}

}  // namespace cpu

void RouterTopk::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto task = [routing = routing_, reference = reference_](
                        const auto& in, auto& out) {
    const Format format = dense_format(float_type_of(in[1].dtype()));
    size_t next = 1;
    const cpu::Matrix w(in, next, format, in[0].shape(-1));
    const int tokens = in[0].shape(0);
    const auto logits = cpu::uninitialized(static_cast<size_t>(tokens) * w.n);
    if (reference) {
      reference::router_logits(w, in[0], logits.get());
    } else {
      cpu::router_logits(w, in[0], logits.get());
    }
    for (int t = 0; t < tokens; t++) {
      const size_t row = static_cast<size_t>(t) * routing.top_k;
      cpu::select_experts(
          logits.get() + static_cast<size_t>(t) * w.n,
          in[2].template data<float>(),
          w.n,
          routing,
          out[0].template data<int32_t>() + row,
          out[1].template data<float>() + row);
    }
  };
  cpu::dispatch(*this, inputs, outputs, task);
}

}  // namespace glm_fused
