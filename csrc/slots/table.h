// A table knows which expert is in which slot of one layer. It is bookkeeping
// alone, without memory or locks.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "slots/policy.h"

namespace glm_fused::slots {

struct Placement {
  int expert;
  int slot;
};

class SlotTable {
 public:
  // The last `spares` of `slots` are for lookahead.
  SlotTable(int experts, int slots, int spares, std::unique_ptr<Policy> policy);

  // Leases a slot to each of `experts`, which must differ: all hits first, so
  // that no victim is an expert of the same request. Returns false and changes
  // nothing if leases leave too few slots, or if it throws. `misses` have to be
  // read.
  bool reserve(
      const std::vector<int>& experts,
      std::vector<Placement>& hits,
      std::vector<Placement>& misses);
  // Ends one lease per entry.
  void release(const std::vector<int>& slots) noexcept;

  // Returns a spare slot to read `expert` into, or -1 if it is resident or none
  // is free. It never evicts what a request brought in.
  int reserve_spare(int expert);

  void loaded(int slot) noexcept;
  // Declares the slot's content undefined: the next request reads again.
  void failed(int slot, std::string error) noexcept;

  bool loading(int slot) const {
    return slots_[slot].loading;
  }
  const std::string& error(int slot) const {
    return slots_[slot].error;
  }
  int slot_of(int expert) const {
    return where_[expert];
  }
  int size() const {
    return static_cast<int>(slots_.size());
  }
  int spares() const {
    return spares_;
  }
  // Returns the size of the largest request that always fits.
  int capacity() const {
    return size() - spares_ - policy_->pinned();
  }

 private:
  struct Slot {
    int expert = -1;
    int leases = 0;
    bool loading = false;
    bool spare = false;
    std::string error;
  };

  bool idle(const Slot& slot) const {
    return slot.leases == 0 && !slot.loading;
  }
  int available(const std::vector<bool>& needed) const;
  int take_slot(const std::vector<bool>& needed);
  void promote(int slot, const std::vector<bool>& needed);
  void begin_load(int slot, int expert);

  const int spares_;
  std::unique_ptr<Policy> policy_;
  std::vector<Slot> slots_;
  std::vector<int> where_;  // expert to slot, -1: not resident
  int hand_ = 0;            // the spare slot to try next
};

}  // namespace glm_fused::slots
