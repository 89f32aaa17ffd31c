#include "slots/use.h"

#include <algorithm>
#include <new>
#include <stdexcept>

namespace glm_fused::slots {

void Reads::fail(const char* error) noexcept {
  std::lock_guard lock(mutex_);
  if (error_.empty()) {
    try {
      error_ = error;
    } catch (const std::bad_alloc&) {
      error_ = "out of memory.";  // a text so short takes none
    }
  }
}

std::string Reads::error() const {
  for (const Reads* r = this; r != nullptr; r = r->origin_.get()) {
    std::lock_guard lock(r->mutex_);
    if (!r->error_.empty()) {
      return r->error_;
    }
  }
  return "";
}

bool Reads::failed() const noexcept {
  for (const Reads* r = this; r != nullptr; r = r->origin_.get()) {
    std::lock_guard lock(r->mutex_);
    if (!r->error_.empty()) {
      return true;
    }
  }
  return false;
}

void Use::resolve(
    const int32_t* experts,
    int tokens,
    int top_k,
    int32_t* slots) noexcept {
  // No kernel takes these; they stand until the slots are known.
  std::fill_n(slots, static_cast<size_t>(tokens) * top_k, -1);
  experts_.clear();
  if (reads_->failed()) {
    return;
  }
  try {
    lease_ = bank_->try_acquire(experts, tokens, top_k, slots);
    counted_ = lease_ != nullptr;
    tokens_ = tokens;
    top_k_ = top_k;
    experts_.assign(experts, experts + static_cast<size_t>(tokens) * top_k);
  } catch (const std::exception& error) {
    failed(error);
    unresolved_ = true;
  }
}

void Use::fill(
    const int32_t* experts,
    int tokens,
    int top_k,
    int32_t* slots) noexcept {
  resolve(experts, tokens, top_k, slots);
  try {
    wait(slots, static_cast<size_t>(tokens) * top_k);
  } catch (const std::exception&) {
    // The reads remember it.
  }
}

bool Use::begin(int32_t* slots, size_t count) {
  if (reads_->failed()) {
    return false;
  }
  if (experts_.size() != count) {
    throw std::runtime_error("[slots] the experts were not resolved.");
  }
  if (!lease_ || !bank_->hold(*lease_)) {
    lease_.reset();
    lease_ = bank_->acquire(experts_.data(), tokens_, top_k_, slots, counted_);
    counted_ = true;
  }
  return true;
}

std::vector<int> Use::take(std::vector<int>& pending) {
  return bank_->take(pending);
}

void Use::end() {
  lease_.reset();
}

void Use::failed(const std::exception& error) noexcept {
  const bool memory = dynamic_cast<const std::bad_alloc*>(&error) != nullptr;
  reads_->fail(memory ? "[slots] out of memory." : error.what());
  lease_.reset();
}

void Use::wait(int32_t* slots, size_t count) {
  try {
    if (unresolved_) {
      throw std::runtime_error(error());
    }
    if (begin(slots, count)) {
      bank_->wait(slots, count);
      return;
    }
  } catch (const std::exception& error) {
    failed(error);
    std::fill_n(slots, count, 0);
    throw;
  }
  std::fill_n(slots, count, 0);
}

}  // namespace glm_fused::slots
