// This is what a bank shares with its leases and with the reads in flight.
#pragma once

#include <condition_variable>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "slots/bank.h"
#include "slots/checksum.h"

namespace glm_fused::slots {

// The text is so short that a string of it needs no memory of its own.
inline constexpr const char* kOutOfMemory = "out of memory.";

// The state lives apart from the bank: a read in flight keeps the memory alive,
// but not the reader, which cannot be destroyed on one of its own threads.
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

  // Ends the oldest open lease; returns false if there is none.
  bool take_back() {
    if (open.empty()) {
      return false;
    }
    table->release(open.front()->slots_);
    open.front()->slots_.clear();
    open.pop_front();
    return true;
  }

  // Ends a load, even where there is no memory left.
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

}  // namespace glm_fused::slots
