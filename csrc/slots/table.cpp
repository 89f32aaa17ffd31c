#include "slots/table.h"

#include <stdexcept>
#include <utility>

namespace glm_fused::slots {

SlotTable::SlotTable(
    int experts,
    int slots,
    int spares,
    std::unique_ptr<Policy> policy)
    : spares_(spares),
      policy_(std::move(policy)),
      slots_(slots),
      where_(experts, -1) {
  if (spares < 0 || capacity() < 1) {
    throw std::invalid_argument(
        "[slots] a bank of " + std::to_string(slots) +
        " slots has no room for " + std::to_string(spares) + " spare and " +
        std::to_string(policy_->pinned()) + " pinned ones.");
  }
  for (int i = slots - spares; i < slots; i++) {
    slots_[i].spare = true;
  }
}

bool SlotTable::reserve(
    const std::vector<int>& experts,
    std::vector<Placement>& hits,
    std::vector<Placement>& misses) {
  std::vector<bool> needed(where_.size());
  int wanted = 0;
  for (int expert : experts) {
    needed[expert] = true;
    const int slot = where_[expert];
    wanted += slot < 0 || slots_[slot].spare;
  }
  if (wanted > available(needed)) {
    return false;
  }
  // Nothing from here on allocates.
  hits.reserve(experts.size());
  misses.reserve(experts.size());
  if (!experts.empty()) {
    policy_->begin_request(experts);
  }
  for (int expert : experts) {
    if (const int slot = where_[expert]; slot >= 0) {
      slots_[slot].leases++;
      if (slots_[slot].spare) {
        promote(slot, needed);
      } else {
        policy_->hit(expert);
      }
      hits.push_back({expert, slot});
    }
  }
  for (int expert : experts) {
    if (where_[expert] < 0) {
      const int slot = take_slot(needed);
      begin_load(slot, expert);
      slots_[slot].leases = 1;
      policy_->admit(expert);
      misses.push_back({expert, slot});
    }
  }
  return true;
}

void SlotTable::release(const std::vector<int>& slots) noexcept {
  for (int slot : slots) {
    slots_[slot].leases--;
  }
}

int SlotTable::reserve_spare(int expert) {
  if (where_[expert] >= 0) {
    return -1;
  }
  for (int i = 0; i < size(); i++) {
    const int slot = (hand_ + i) % size();
    if (slots_[slot].spare && idle(slots_[slot])) {
      if (slots_[slot].expert >= 0) {
        where_[slots_[slot].expert] = -1;
      }
      begin_load(slot, expert);
      hand_ = slot + 1;
      return slot;
    }
  }
  return -1;
}

void SlotTable::loaded(int slot) noexcept {
  slots_[slot].loading = false;
}

void SlotTable::failed(int slot, std::string error) noexcept {
  Slot& s = slots_[slot];
  if (!s.spare) {
    policy_->drop(s.expert);
  }
  where_[s.expert] = -1;
  s.expert = -1;
  s.loading = false;
  s.error = std::move(error);
}

int SlotTable::available(const std::vector<bool>& needed) const {
  int count = 0;
  for (const Slot& slot : slots_) {
    const int e = slot.expert;
    count += !slot.spare && idle(slot) &&
        (e < 0 || (!needed[e] && policy_->may_evict(e)));
  }
  return count;
}

int SlotTable::take_slot(const std::vector<bool>& needed) {
  for (int i = 0; i < size(); i++) {
    if (!slots_[i].spare && slots_[i].expert < 0 && idle(slots_[i])) {
      return i;
    }
  }
  const int victim = policy_->evict([&](int expert) {
    return !needed[expert] && idle(slots_[where_[expert]]);
  });
  const int slot = where_[victim];
  where_[victim] = -1;
  slots_[slot].expert = -1;
  return slot;
}

// A request needs what lookahead read: its slot joins the others, and one of
// them becomes the spare slot in its stead.
void SlotTable::promote(int slot, const std::vector<bool>& needed) {
  slots_[take_slot(needed)].spare = true;
  slots_[slot].spare = false;
  policy_->admit(slots_[slot].expert);
}

void SlotTable::begin_load(int slot, int expert) {
  slots_[slot].expert = expert;
  slots_[slot].loading = true;
  slots_[slot].error.clear();
  where_[expert] = slot;
}

}  // namespace glm_fused::slots
