// The choices of a few tokens, grouped by the slot that they take.
#pragma once

#include <algorithm>
#include <numeric>
#include <span>

#include "cpu/dot/dot_kernels.h"
#include "cpu/runtime/scratch.h"

namespace glm_fused::cpu {

// Up to eight (token, choice) pairs that share a slot. Pair p of a chunk is
// token p / top_k, choice p % top_k.
struct Panel {
  int slot;
  int first;  // its first pair's place in the order of all pairs
  int width;
};

class Panels {
 public:
  Panels(int most_pairs, int top_k, Scratch& scratch)
      : top_k_(top_k),
        order_(scratch.take<int>(most_pairs)),
        panels_(scratch.take<Panel>(most_pairs)),
        by_tokens_(scratch.take<int>(most_pairs)) {}

  // Makes the panels, sorted by slot and within a slot by pair.
  void group(const int32_t* slots, int pairs) {
    const auto order = order_.first(pairs);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int a, int b) {
      return slots[a] != slots[b] ? slots[a] < slots[b] : a < b;
    });
    count_ = 0;
    for (int at = 0; at < pairs;) {
      const int slot = slots[order[at]];
      int end = at + 1;
      while (end < pairs && slots[order[end]] == slot) {
        end++;
      }
      while (at < end) {
        const int width = panel_width(end - at);
        panels_[count_++] = {slot, at, width};
        at += width;
      }
    }
  }

  int count() const {
    return count_;
  }
  const Panel& operator[](int i) const {
    return panels_[i];
  }
  std::span<const int> pairs(int i) const {
    return order_.subspan(panels_[i].first, panels_[i].width);
  }
  // Returns how many of some panels, the first and those right behind it, the
  // kernels take together: full ones of the same slot.
  int together(std::span<const int> panels) const {
    const Panel& first = panels_[panels[0]];
    const int most = std::min<int>(panels.size(), kMaxPanels);
    int count = 1;
    while (count < most && panels_[panels[count]].width == first.width &&
           panels_[panels[count]].slot == first.slot) {
      count++;
    }
    return count;
  }
  int token(int pair) const {
    return pair / top_k_;
  }

  // Calls each(i, twin) for all panels: `twin` is a panel that came before and
  // has the same tokens, or i where there is none.
  template <class Each>
  void each_twin(const Each& each) const {
    const auto all = by_tokens_.first(count_);
    const auto same = [&](int a, int b) { return a / top_k_ == b / top_k_; };
    const auto less = [&](int a, int b) { return a / top_k_ < b / top_k_; };
    std::iota(all.begin(), all.end(), 0);
    std::sort(all.begin(), all.end(), [&](int a, int b) {
      const auto p = pairs(a), q = pairs(b);
      return std::lexicographical_compare(
          p.begin(), p.end(), q.begin(), q.end(), less);
    });
    int twin = -1;
    for (int i : all) {
      const auto p = pairs(i);
      const auto q = twin < 0 ? p.first(0) : pairs(twin);
      if (!std::equal(p.begin(), p.end(), q.begin(), q.end(), same)) {
        twin = i;
      }
      each(i, twin);
    }
  }

 private:
  int top_k_, count_ = 0;
  std::span<int> order_;
  std::span<Panel> panels_;
  std::span<int> by_tokens_;
};

}  // namespace glm_fused::cpu
