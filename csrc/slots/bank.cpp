#include "slots/bank.h"

#include <algorithm>
#include <new>
#include <stdexcept>
#include <utility>

#include "slots/checksum.h"

namespace glm_fused::slots {

namespace {

// So short that a string of it needs no memory of its own.
constexpr const char* kOutOfMemory = "out of memory.";

// Reads, checksums and waits rely on these.
void check(const BankOptions& o) {
  const std::string layer = "[slots] layer " + std::to_string(o.layer) + ": ";
  const size_t experts = o.locations.size() / o.parts.size();
  for (const Part& part : o.parts) {
    if (part.bytes < 1) {
      throw std::invalid_argument(layer + "a part of an expert has no bytes.");
    }
  }
  if (!o.checksums.empty() && o.checksums.size() != experts) {
    throw std::invalid_argument(
        layer + std::to_string(o.checksums.size()) +
        " checksums are not one "
        "for each of " +
        std::to_string(experts) + " experts.");
  }
}

}  // namespace

// Apart from the bank, so that a read in flight keeps the memory alive but not
// the reader, which cannot be destroyed on a thread of its own.
struct Lease::State {
  BankOptions options;
  std::unique_ptr<SlotTable> table;  // this and all below: under `mutex`
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
  std::string layer() const {
    return "[slots] layer " + std::to_string(options.layer);
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

  // The end of a load. Whatever memory is left, it ends.
  void finish(int expert, int slot, const std::string& error) noexcept {
    std::string text;
    try {
      text = error.empty() ? damage(expert, slot) : error;
      if (!text.empty()) {
        text = "expert " + std::to_string(expert) + ": " + text;
      }
    } catch (const std::exception&) {
      text = kOutOfMemory;
    }
    {
      std::lock_guard lock(mutex);
      if (text.empty()) {
        table->loaded(slot);
      } else {
        table->failed(slot, std::move(text));
      }
    }
    changed.notify_all();
  }
};

namespace {

// MLX keeps the text of an error alone, so that one of memory says where.
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

std::shared_ptr<Lease>
Bank::acquire(const int32_t* experts, int tokens, int top_k, int32_t* slots) {
  return with_memory(
      *state_, [&] { return lease(experts, tokens, top_k, slots); });
}

// An exception ends the leases that it has taken and the loads that it has not
// started.
std::shared_ptr<Lease>
Bank::lease(const int32_t* experts, int tokens, int top_k, int32_t* slots) {
  const size_t count = static_cast<size_t>(tokens) * top_k;
  const auto wanted = distinct(experts, count);
  State& s = *state_;
  std::vector<Placement> hits, misses;
  std::vector<int> leased;
  leased.reserve(wanted.size());
  // Made before it holds anything: from the reservation on, nothing is lost.
  std::shared_ptr<Lease> lease(new Lease(state_, std::move(leased)));
  std::unique_lock lock(s.mutex);
  if (static_cast<int>(wanted.size()) > s.table->capacity()) {
    throw std::runtime_error(
        s.layer() + ": " + std::to_string(wanted.size()) +
        " experts at once need a larger bank than " +
        std::to_string(s.table->capacity()) + " slots.");
  }
  const auto fits = [&] { return s.table->reserve(wanted, hits, misses); };
  if (!s.changed.wait_for(lock, s.options.patience, fits)) {
    throw std::runtime_error(
        s.layer() +
        ": too many slots are held by arrays that were not released.");
  }
  for (const auto* placements : {&hits, &misses}) {
    for (const Placement& p : *placements) {
      lease->slots_.push_back(p.slot);
    }
  }
  for (size_t i = 0; i < count; i++) {
    slots[i] = s.table->slot_of(experts[i]);
  }
  size_t begun = 0;
  try {
    record(experts, tokens, top_k, hits.size(), misses.size());
    lock.unlock();
    while (begun < misses.size()) {
      const Placement& miss = misses[begun++];
      load(miss.expert, miss.slot, true);
    }
  } catch (...) {
    if (lock.owns_lock()) {
      lock.unlock();
    }
    for (; begun < misses.size(); begun++) {
      s.finish(misses[begun].expert, misses[begun].slot, kOutOfMemory);
    }
    throw;
  }
  return lease;
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

void Bank::record(
    const int32_t* experts,
    int tokens,
    int top_k,
    size_t hits,
    size_t misses) {
  State& s = *state_;
  const int64_t bytes = static_cast<int64_t>(misses) * expert_bytes_;
  s.stats.hits += hits;
  s.stats.misses += misses;
  s.stats.bytes += bytes;
  if (s.recording) {
    s.requests.push_back(
        {s.tokens,
         {experts, experts + static_cast<size_t>(tokens) * top_k},
         top_k,
         static_cast<int>(hits),
         static_cast<int>(misses),
         bytes,
         0});
  }
  s.tokens += tokens;
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
