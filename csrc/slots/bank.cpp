#include "slots/bank.h"

#include <algorithm>
#include <list>
#include <stdexcept>
#include <utility>

#include "slots/checksum.h"

namespace glm_fused::slots {

// Apart from the bank, so that a read in flight keeps the memory alive but not
// the reader, which cannot be destroyed on a thread of its own.
struct Lease::State {
  BankOptions options;
  std::unique_ptr<SlotTable> table;  // this and all below: under `mutex`
  std::list<Lease*> open;            // the oldest first
  BankStats stats;
  bool recording = false;
  int64_t tokens = 0;
  std::vector<Request> requests;
  mutable std::mutex mutex;
  std::condition_variable changed;

  int experts() const {
    return static_cast<int>(options.locations.size() / options.parts.size());
  }
  std::byte* memory(int slot, const Part& part) const {
    return part.memory + slot * part.bytes;
  }
  std::string name(int expert) const {
    return "[slots] layer " + std::to_string(options.layer) + ", expert " +
        std::to_string(expert) + ": ";
  }

  std::string damage(int expert, int slot) const {
    if (options.checksums.empty()) {
      return "";
    }
    Checksum sum;
    for (const Part& part : options.parts) {
      sum.add(memory(slot, part), part.bytes);
    }
    const Location& at = options.locations[expert * options.parts.size()];
    return sum.value() == options.checksums[expert]
        ? ""
        : options.files->path(at.file) + ": damaged at offset " +
            std::to_string(at.offset) + ", the checksum differs.";
  }

  // Ends the oldest open lease; false if there is none.
  bool take_back() {
    if (open.empty()) {
      return false;
    }
    table->release(open.front()->slots_);
    open.front()->slots_.clear();
    open.pop_front();
    return true;
  }

  void finish(int expert, int slot, std::string error) {
    if (error.empty()) {
      error = damage(expert, slot);
    }
    {
      std::lock_guard lock(mutex);
      if (error.empty()) {
        table->loaded(slot);
      } else {
        table->failed(slot, name(expert) + error);
      }
    }
    changed.notify_all();
  }
};

Lease::~Lease() {
  {
    std::lock_guard lock(state_->mutex);
    state_->open.remove(this);
    state_->table->release(slots_);
  }
  state_->changed.notify_all();
}

Bank::Bank(
    std::shared_ptr<Reader> reader,
    BankOptions options,
    std::unique_ptr<SlotTable> table)
    : reader_(std::move(reader)), state_(std::make_shared<Lease::State>()) {
  for (const Part& part : options.parts) {
    expert_bytes_ += part.bytes;
  }
  state_->options = std::move(options);
  state_->table = std::move(table);
}

Bank::~Bank() = default;

// A request, where its experts are and the lease that it gets.
struct Bank::Reservation {
  const int32_t* experts;
  int tokens, top_k;
  std::vector<int> wanted;  // distinct
  std::shared_ptr<Lease> lease;
  std::vector<Placement> hits, misses;

  size_t count() const {
    return static_cast<size_t>(tokens) * top_k;
  }
};

Bank::Reservation Bank::reserve_for(
    const int32_t* experts,
    int tokens,
    int top_k) const {
  Reservation r{experts, tokens, top_k, {}, nullptr, {}, {}};
  r.wanted = distinct(experts, r.count());
  if (static_cast<int>(r.wanted.size()) > capacity()) {
    throw std::runtime_error(
        "[slots] layer " + std::to_string(state_->options.layer) + ": " +
        std::to_string(r.wanted.size()) +
        " experts at once need a larger bank than " +
        std::to_string(capacity()) + " slots.");
  }
  r.lease.reset(new Lease(state_));
  return r;
}

// After the table has reserved the slots.
void Bank::begin(const Reservation& r, int32_t* slots, bool again) {
  for (const auto* placements : {&r.hits, &r.misses}) {
    for (const Placement& p : *placements) {
      r.lease->slots_.push_back(p.slot);
    }
  }
  for (size_t i = 0; i < r.count(); i++) {
    slots[i] = state_->table->slot_of(r.experts[i]);
  }
  record(r, again);
}

std::shared_ptr<Lease> Bank::acquire(
    const int32_t* experts,
    int tokens,
    int top_k,
    int32_t* slots,
    bool again) {
  auto r = reserve_for(experts, tokens, top_k);
  State& s = *state_;
  const auto fits = [&] {
    do {
      if (s.table->reserve(r.wanted, r.hits, r.misses)) {
        return true;
      }
    } while (s.take_back());
    return false;
  };
  {
    std::unique_lock lock(s.mutex);
    if (!s.changed.wait_for(lock, s.options.patience, fits)) {
      throw std::runtime_error(
          "[slots] layer " + std::to_string(s.options.layer) +
          ": too many slots are held by arrays that were not released.");
    }
    begin(r, slots, again);
  }
  for (const Placement& miss : r.misses) {
    load(miss.expert, miss.slot, true);
  }
  return r.lease;
}

std::shared_ptr<Lease> Bank::try_acquire(
    const int32_t* experts,
    int tokens,
    int top_k,
    int32_t* slots) {
  auto r = reserve_for(experts, tokens, top_k);
  {
    std::lock_guard lock(state_->mutex);
    if (!state_->table->reserve(r.wanted, r.hits, r.misses)) {
      return nullptr;
    }
    begin(r, slots, false);
    state_->open.push_back(r.lease.get());
  }
  for (const Placement& miss : r.misses) {
    load(miss.expert, miss.slot, true);
  }
  return r.lease;
}

bool Bank::hold(Lease& lease) {
  std::lock_guard lock(state_->mutex);
  state_->open.remove(&lease);
  return !lease.slots_.empty();
}

std::vector<int> Bank::take(std::vector<int>& pending) {
  State& s = *state_;
  const auto start = std::chrono::steady_clock::now();
  std::unique_lock lock(s.mutex);
  std::vector<int>::iterator read;
  s.changed.wait(lock, [&] {
    read = std::stable_partition(pending.begin(), pending.end(), [&](int slot) {
      return s.table->loading(slot);
    });
    return read != pending.end();
  });
  const auto elapsed = std::chrono::steady_clock::now() - start;
  const int64_t us =
      std::chrono::duration_cast<std::chrono::microseconds>(elapsed).count();
  s.stats.wait_us += us;
  if (!s.requests.empty()) {
    s.requests.back().wait_us += us;
  }
  const std::vector<int> slots(read, pending.end());
  pending.erase(read, pending.end());
  for (int slot : slots) {
    if (!s.table->error(slot).empty()) {
      throw std::runtime_error(s.table->error(slot));
    }
  }
  return slots;
}

void Bank::wait(const int32_t* slots, size_t count) {
  std::vector<int> pending(slots, slots + count);
  while (!pending.empty()) {
    take(pending);
  }
}

void Bank::prefetch(const int32_t* experts, size_t count) {
  // No more than fit: one would replace another of the same call.
  int left = state_->table->spares();
  for (int expert : distinct(experts, count)) {
    int slot = -1;
    if (left > 0) {
      std::lock_guard lock(state_->mutex);
      slot = state_->table->reserve_spare(expert);
      state_->stats.prefetches += slot >= 0;
      state_->stats.bytes += slot >= 0 ? expert_bytes_ : 0;
    }
    if (slot >= 0) {
      left--;
      load(expert, slot, false);
    }
  }
}

int Bank::capacity() const {
  return state_->table->capacity();
}

std::vector<int> Bank::resident() const {
  std::lock_guard lock(state_->mutex);
  std::vector<int> experts;
  for (int e = 0; e < state_->experts(); e++) {
    if (state_->table->slot_of(e) >= 0) {
      experts.push_back(e);
    }
  }
  return experts;
}

BankStats Bank::stats() const {
  std::lock_guard lock(state_->mutex);
  return state_->stats;
}

std::vector<Request> Bank::take_requests() {
  std::lock_guard lock(state_->mutex);
  state_->recording = true;
  return std::exchange(state_->requests, {});
}

std::vector<int> Bank::distinct(const int32_t* experts, size_t count) const {
  std::vector<bool> seen(state_->experts());
  std::vector<int> result;
  for (size_t i = 0; i < count; i++) {
    const int expert = experts[i];
    if (expert < 0 || expert >= state_->experts()) {
      throw std::runtime_error(
          state_->name(expert) + "there are " +
          std::to_string(state_->experts()) + " experts.");
    }
    if (!seen[expert]) {
      seen[expert] = true;
      result.push_back(expert);
    }
  }
  return result;
}

void Bank::record(const Reservation& r, bool again) {
  State& s = *state_;
  const int64_t bytes = static_cast<int64_t>(r.misses.size()) * expert_bytes_;
  s.stats.bytes += bytes;
  if (again) {
    return;
  }
  s.stats.hits += r.hits.size();
  s.stats.misses += r.misses.size();
  if (s.recording) {
    s.requests.push_back(
        {s.tokens,
         {r.experts, r.experts + r.count()},
         r.top_k,
         static_cast<int>(r.hits.size()),
         static_cast<int>(r.misses.size()),
         bytes,
         0});
  }
  s.tokens += r.tokens;
}

void Bank::load(int expert, int slot, bool urgent) {
  const BankOptions& o = state_->options;
  std::vector<Extent> extents;
  for (size_t i = 0; i < o.parts.size(); i++) {
    const Location& at = o.locations[expert * o.parts.size() + i];
    extents.push_back(
        {at.file,
         at.offset,
         o.parts[i].bytes,
         state_->memory(slot, o.parts[i])});
  }
  reader_->read(
      o.files,
      extents,
      urgent,
      [state = state_, expert, slot](const std::string& error) {
        state->finish(expert, slot, error);
      });
}

}  // namespace glm_fused::slots
