#include "slots/bank.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <utility>

#include "slots/bank_state.h"

namespace glm_fused::slots {

namespace {

// Reads, checksums and waits rely on these.
void check(const BankOptions& o) {
  const std::string layer = "[slots] layer " + std::to_string(o.layer);
  const size_t experts = o.locations.size() / o.parts.size();
  for (const Part& part : o.parts) {
    if (part.bytes < 1) {
      throw std::invalid_argument(
          layer + ": a part of an expert has no bytes.");
    }
  }
  if (!o.checksums.empty() && o.checksums.size() != experts) {
    throw std::invalid_argument(
        layer + ": " + std::to_string(o.checksums.size()) +
        " checksums are not one for each of " + std::to_string(experts) +
        " experts.");
  }
}

}  // namespace

namespace {

// MLX keeps nothing but the text of an error, so that of memory says where.
template <class State, class Run>
auto with_memory(const State& state, const Run& run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(state.layer() + ": " + kOutOfMemory);
  }
}

}  // namespace

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
  check(options);
  for (const Part& part : options.parts) {
    expert_bytes_ += part.bytes;
  }
  state_->options = std::move(options);
  state_->table = std::move(table);
}

Bank::~Bank() = default;

// A request knows where its experts are and which lease it gets. It is made
// before it holds anything, so that an exception loses nothing that it holds.
struct Bank::Reservation {
  const int32_t* experts;
  int tokens, top_k;
  std::vector<int> wanted;  // distinct
  std::shared_ptr<Lease> lease;
  std::list<Lease*> open;  // the lease
  std::vector<Placement> hits, misses;

  size_t count() const {
    return static_cast<size_t>(tokens) * top_k;
  }
};

Bank::Reservation
Bank::reserve_for(const int32_t* experts, int tokens, int top_k) const {
  Reservation r{experts, tokens, top_k, {}, nullptr, {}, {}, {}};
  r.wanted = distinct(experts, r.count());
  if (static_cast<int>(r.wanted.size()) > capacity()) {
    throw std::runtime_error(
        state_->layer() + ": " + std::to_string(r.wanted.size()) +
        " experts at once need a larger bank than " +
        std::to_string(capacity()) + " slots.");
  }
  r.lease.reset(new Lease(state_));
  r.lease->slots_.reserve(r.wanted.size());
  r.open.push_back(r.lease.get());
  return r;
}

// Is called after the table has reserved the slots; unlocks. An exception ends
// the loads that have not begun.
void Bank::begin(
    const Reservation& r,
    std::unique_lock<std::mutex> lock,
    int32_t* slots,
    bool again) {
  for (const auto* placements : {&r.hits, &r.misses}) {
    for (const Placement& p : *placements) {
      r.lease->slots_.push_back(p.slot);
    }
  }
  for (size_t i = 0; i < r.count(); i++) {
    slots[i] = state_->table->slot_of(r.experts[i]);
  }
  size_t begun = 0;
  try {
    record(r, again);
    lock.unlock();
    while (begun < r.misses.size()) {
      const Placement& miss = r.misses[begun++];
      load(miss.expert, miss.slot, true);
    }
  } catch (...) {
    if (lock.owns_lock()) {
      lock.unlock();
    }
    for (; begun < r.misses.size(); begun++) {
      const Placement& miss = r.misses[begun];
      state_->finish(miss.expert, miss.slot, kOutOfMemory);
    }
    throw;
  }
}

std::shared_ptr<Lease> Bank::acquire(
    const int32_t* experts,
    int tokens,
    int top_k,
    int32_t* slots,
    bool again) {
  return with_memory(*state_, [&] {
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
    std::unique_lock lock(s.mutex);
    if (!s.changed.wait_for(lock, s.options.patience, fits)) {
      throw std::runtime_error(
          s.layer() +
          ": too many slots are held by arrays that were not released.");
    }
    begin(r, std::move(lock), slots, again);
    return r.lease;
  });
}

std::shared_ptr<Lease> Bank::try_acquire(
    const int32_t* experts,
    int tokens,
    int top_k,
    int32_t* slots) {
  return with_memory(*state_, [&]() -> std::shared_ptr<Lease> {
    auto r = reserve_for(experts, tokens, top_k);
    std::unique_lock lock(state_->mutex);
    if (!state_->table->reserve(r.wanted, r.hits, r.misses)) {
      return nullptr;
    }
    state_->open.splice(state_->open.end(), r.open);
    begin(r, std::move(lock), slots, false);
    return r.lease;
  });
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
      throw std::runtime_error(s.layer() + ", " + s.table->error(slot));
    }
  }
  return slots;
}

void Bank::wait(const int32_t* slots, size_t count) {
  with_memory(*state_, [&] {
    std::vector<int> pending(slots, slots + count);
    while (!pending.empty()) {
      take(pending);
    }
  });
}

void Bank::prefetch(const int32_t* experts, size_t count) {
  with_memory(*state_, [&] { read_ahead(experts, count); });
}

void Bank::read_ahead(const int32_t* experts, size_t count) {
  // It reads no more than fit: one would replace another of the same call.
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
          state_->layer() + ", expert " + std::to_string(expert) +
          ": there are " + std::to_string(state_->experts()) + " experts.");
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
  try {
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
        [state = state_, expert, slot](const std::string& error) noexcept {
          state->finish(expert, slot, error);
        });
  } catch (...) {
    state_->finish(expert, slot, kOutOfMemory);
    throw;
  }
}

}  // namespace glm_fused::slots
