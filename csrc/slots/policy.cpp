#include "slots/policy.h"

#include <algorithm>
#include <list>
#include <stdexcept>
#include <string>

#include "slots/learned_policy.h"

namespace glm_fused::slots {

namespace {

using Test = std::function<bool(int)>;

class Lru : public Policy {
 public:
  explicit Lru(int experts) {
    for (int e = 0; e < experts; e++) {
      where_.push_back(absent_.insert(absent_.end(), e));
    }
  }

  void hit(int expert) override {
    order_.splice(order_.begin(), order_, where_[expert]);
  }
  void admit(int expert) override {
    order_.splice(order_.begin(), absent_, where_[expert]);
  }
  void drop(int expert) override {
    absent_.splice(absent_.begin(), order_, where_[expert]);
  }
  int evict(const Test& evictable) override {
    const auto oldest = std::find_if(order_.rbegin(), order_.rend(), evictable);
    const int expert = *oldest;
    drop(expert);
    return expert;
  }

 private:
  std::list<int> order_;   // latest first
  std::list<int> absent_;  // the others' nodes
  std::vector<std::list<int>::iterator> where_;
};

class PinnedLru : public Lru {
 public:
  PinnedLru(int experts, const std::vector<int>& pinned)
      : Lru(experts), pinned_(experts) {
    for (int expert : pinned) {
      if (expert < 0 || expert >= experts) {
        throw std::invalid_argument(
            "[slots] expert " + std::to_string(expert) +
            " cannot be pinned: there are " + std::to_string(experts) +
            " experts.");
      }
      pinned_[expert] = true;
    }
  }

  bool may_evict(int expert) const override {
    return !pinned_[expert];
  }
  int pinned() const override {
    return static_cast<int>(std::count(pinned_.begin(), pinned_.end(), true));
  }
  int evict(const Test& evictable) override {
    return Lru::evict(
        [&](int expert) { return !pinned_[expert] && evictable(expert); });
  }

 private:
  std::vector<bool> pinned_;
};

// S3-FIFO (https://doi.org/10.1145/3600006.3613147): a small queue filters
// experts used once, a ghost queue readmits those evicted too early.
class S3Fifo : public Policy {
 public:
  S3Fifo(int experts, int slots)
      : small_size_(std::max<size_t>(1, slots / 10)),
        ghost_size_(std::max<size_t>(1, slots - small_size_)),
        uses_(experts) {
    small_.reserve(experts);
    main_.reserve(experts);
    ghost_.reserve(experts + 1);
  }

  void hit(int expert) override {
    uses_[expert] = std::min(uses_[expert] + 1, 3);
  }
  void admit(int expert) override {
    uses_[expert] = 0;
    const auto ghost = std::find(ghost_.begin(), ghost_.end(), expert);
    if (ghost == ghost_.end()) {
      push_front(small_, expert);
    } else {
      ghost_.erase(ghost);
      push_front(main_, expert);
    }
  }
  void drop(int expert) override {
    std::erase(small_, expert);
    std::erase(main_, expert);
  }
  int evict(const Test& evictable) override {
    const bool small_first = small_.size() >= small_size_ || main_.empty();
    int expert = small_first ? from_small(evictable) : from_main(evictable);
    if (expert < 0) {
      expert = small_first ? from_main(evictable) : from_small(evictable);
    }
    return expert;
  }

 private:
  using Queue = std::vector<int>;  // latest first; never outgrows its memory

  static void push_front(Queue& queue, int expert) {
    queue.insert(queue.begin(), expert);
  }

  // Takes the oldest evictable expert out of the queue; -1 if there is none.
  static int take(Queue& queue, const Test& evictable) {
    const auto at = std::find_if(queue.rbegin(), queue.rend(), evictable);
    if (at == queue.rend()) {
      return -1;
    }
    const int expert = *at;
    queue.erase(std::next(at).base());
    return expert;
  }

  int from_small(const Test& evictable) {
    while (true) {
      const int expert = take(small_, evictable);
      if (expert < 0) {
        return -1;
      }
      if (uses_[expert] <= 1) {
        remember(expert);
        return expert;
      }
      uses_[expert] = 0;
      push_front(main_, expert);
    }
  }

  int from_main(const Test& evictable) {
    while (true) {
      const int expert = take(main_, evictable);
      if (expert < 0 || uses_[expert] == 0) {
        return expert;
      }
      uses_[expert]--;
      push_front(main_, expert);
    }
  }

  void remember(int expert) {
    push_front(ghost_, expert);
    if (ghost_.size() > ghost_size_) {
      ghost_.pop_back();
    }
  }

  const size_t small_size_, ghost_size_;
  std::vector<int> uses_;  // while resident, at most 3
  Queue small_, main_, ghost_;
};

}  // namespace

std::unique_ptr<Policy> make_policy(
    const std::string& name,
    int experts,
    int slots,
    const std::vector<int>& pinned) {
  constexpr int kMaxExperts = 1 << 16;
  if (experts < 1 || experts > kMaxExperts || slots < 0) {
    throw std::invalid_argument(
        "[slots] a layer has 1 to " + std::to_string(kMaxExperts) +
        " experts and no fewer than 0 slots but is given " +
        std::to_string(experts) + " and " + std::to_string(slots) + ".");
  }
  if (name == "learned") {
    return std::make_unique<LearnedPolicy>(experts);
  }
  if (name == "lru") {
    return std::make_unique<Lru>(experts);
  }
  if (name == "pinned") {
    return std::make_unique<PinnedLru>(experts, pinned);
  }
  if (name == "s3fifo") {
    return std::make_unique<S3Fifo>(experts, slots);
  }
  throw std::invalid_argument(
      "[slots] policy must be learned, lru, s3fifo or pinned but is " + name +
      ".");
}

}  // namespace glm_fused::slots
