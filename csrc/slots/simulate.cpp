#include "slots/simulate.h"

#include <algorithm>
#include <stdexcept>

#include "slots/table.h"

namespace glm_fused::slots {

namespace {

// Returns them in the order of their first appearance, as a bank takes them.
std::vector<int>
distinct(const std::vector<int>& request, int experts, int slots) {
  std::vector<int> result;
  std::vector<bool> seen(experts);
  for (int expert : request) {
    if (expert < 0 || expert >= experts) {
      throw std::invalid_argument(
          "[replay] a request names expert " + std::to_string(expert) + " of " +
          std::to_string(experts) + ".");
    }
    if (!seen[expert]) {
      seen[expert] = true;
      result.push_back(expert);
    }
  }
  if (static_cast<int>(result.size()) > slots) {
    throw std::invalid_argument(
        "[replay] a request of " + std::to_string(result.size()) +
        " experts does not fit " + std::to_string(slots) + " slots.");
  }
  return result;
}

// This policy knows the future.
class Belady : public Policy {
 public:
  Belady(int experts, const std::vector<std::vector<int>>& requests)
      : uses_(experts), resident_(experts) {
    for (size_t i = 0; i < requests.size(); i++) {
      for (int expert : requests[i]) {
        uses_[expert].push_back(i);
      }
    }
  }

  void advance(size_t now) {
    now_ = now;
  }
  void hit(int) override {}
  void admit(int expert) override {
    resident_[expert] = true;
  }
  void drop(int expert) override {
    resident_[expert] = false;
  }
  int evict(const std::function<bool(int)>& evictable) override {
    int victim = -1;
    for (int e = 0; e < static_cast<int>(uses_.size()); e++) {
      if (resident_[e] && evictable(e) &&
          (victim < 0 || next_use(e) > next_use(victim))) {
        victim = e;
      }
    }
    resident_[victim] = false;
    return victim;
  }

 private:
  size_t next_use(int expert) const {
    const auto& uses = uses_[expert];
    const auto at = std::upper_bound(uses.begin(), uses.end(), now_);
    return at == uses.end() ? SIZE_MAX : *at;
  }

  std::vector<std::vector<size_t>> uses_;
  std::vector<bool> resident_;
  size_t now_ = 0;
};

std::pair<int64_t, int64_t> run(
    SlotTable& table,
    const std::vector<std::vector<int>>& requests,
    const std::function<void(size_t)>& begin) {
  int64_t hit_count = 0, miss_count = 0;
  for (size_t i = 0; i < requests.size(); i++) {
    begin(i);
    std::vector<Placement> hits, misses;
    if (!table.reserve(requests[i], hits, misses)) {
      throw std::invalid_argument("[replay] pins leave too few slots.");
    }
    hit_count += static_cast<int64_t>(hits.size());
    miss_count += static_cast<int64_t>(misses.size());
    for (const Placement& miss : misses) {
      table.loaded(miss.slot);
    }
    for (const auto* placements : {&hits, &misses}) {
      for (const Placement& p : *placements) {
        table.release({p.slot});
      }
    }
  }
  return {hit_count, miss_count};
}

std::vector<std::vector<int>> distinct_all(
    const std::vector<std::vector<int>>& requests,
    int experts,
    int slots) {
  std::vector<std::vector<int>> result;
  for (const auto& request : requests) {
    result.push_back(distinct(request, experts, slots));
  }
  return result;
}

}  // namespace

std::pair<int64_t, int64_t> simulate(
    const std::string& policy,
    int experts,
    int slots,
    const std::vector<int>& pinned,
    const std::vector<std::vector<int>>& requests) {
  SlotTable table(
      experts, slots, 0, make_policy(policy, experts, slots, pinned));
  return run(table, distinct_all(requests, experts, slots), [](size_t) {});
}

std::pair<int64_t, int64_t> simulate_optimum(
    int experts,
    int slots,
    const std::vector<std::vector<int>>& requests) {
  const auto wanted = distinct_all(requests, experts, slots);
  auto policy = std::make_unique<Belady>(experts, wanted);
  Belady& belady = *policy;
  SlotTable table(experts, slots, 0, std::move(policy));
  return run(table, wanted, [&](size_t i) { belady.advance(i); });
}

}  // namespace glm_fused::slots
