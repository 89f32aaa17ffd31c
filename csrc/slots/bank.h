// The resident experts of one layer, read from files as requests need them.
//
// A request holds a lease on its slots, and a slot that is leased is not
// overwritten. A lease is open until the kernel that reads the slots begins,
// then held until that has ended. A request that waits for slots takes open
// leases back. So it waits for kernels that run, and never for one that another
// thread has yet to enqueue: MLX bounds the tasks in flight of all streams
// together, so the waiting request may be what keeps that thread from it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "slots/reader.h"
#include "slots/table.h"

namespace glm_fused::slots {

// A part is one tensor of an expert; its slots lie in memory as [slots, bytes].
struct Part {
  int64_t bytes;
  std::byte* memory;
};

struct Location {
  int file;
  int64_t offset;
};

struct BankOptions {
  int layer;
  std::shared_ptr<const Files> files;
  std::vector<Part> parts;
  std::shared_ptr<const void> memory;  // owner of the parts' memory
  std::vector<Location> locations;     // [experts, parts]
  std::vector<uint64_t> checksums;     // [experts], or none
  std::chrono::milliseconds patience{60000};
};

struct Request {
  int64_t first_token;           // of this layer, counted over all requests
  std::vector<int32_t> experts;  // [tokens, top_k]
  int top_k;
  int hits, misses;  // of distinct experts
  int64_t bytes;
  int64_t wait_us;
};

struct BankStats {
  int64_t hits = 0, misses = 0, bytes = 0, wait_us = 0;
  int64_t prefetches = 0;
};

class Bank;

// A lease lets a request read its slots. It ends when it is destroyed or, while
// it is open, when it is taken back.
class Lease {
 public:
  ~Lease();
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

 private:
  friend class Bank;
  struct State;  // of the bank
  explicit Lease(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
  std::vector<int> slots_;  // guarded by the state's mutex; empty if taken back
};

class Bank {
 public:
  Bank(
      std::shared_ptr<Reader> reader,
      BankOptions options,
      std::unique_ptr<SlotTable> table);
  ~Bank();

  // Writes the slot of each of the [tokens, top_k] experts, starts to read
  // those that are not resident, and returns a lease that is held. It waits
  // while leases leave too few slots. It throws std::runtime_error if that
  // takes longer than `patience`, or if there is no memory: then nothing is
  // leased, and experts whose reads had not begun are not resident. A request
  // that comes `again` is counted once.
  std::shared_ptr<Lease> acquire(
      const int32_t* experts,
      int tokens,
      int top_k,
      int32_t* slots,
      bool again = false);
  // Does the same without waiting and returns a lease that is open, or null
  // where leases leave too few slots.
  std::shared_ptr<Lease>
  try_acquire(const int32_t* experts, int tokens, int top_k, int32_t* slots);
  // Makes an open lease a held one; returns false if it was taken back.
  bool hold(Lease& lease);

  // These wait for slots on which the caller has a lease. An error names layer,
  // expert and file; the other experts go on being read after one.
  std::vector<int> take(std::vector<int>& pending);
  // Returns when all are read.
  void wait(const int32_t* slots, size_t count);

  // Starts to read experts into spare slots, as far as there are any.
  void prefetch(const int32_t* experts, size_t count);

  int capacity() const;
  std::vector<int> resident() const;
  BankStats stats() const;
  // Returns the requests since the last call; the first call starts to record.
  std::vector<Request> take_requests();

 private:
  using State = Lease::State;
  struct Reservation;
  Reservation reserve_for(const int32_t* experts, int tokens, int top_k) const;
  void begin(
      const Reservation& r,
      std::unique_lock<std::mutex> lock,
      int32_t* slots,
      bool again);
  void read_ahead(const int32_t* experts, size_t count);
  std::vector<int> distinct(const int32_t* experts, size_t count) const;
  void record(const Reservation& r, bool again);
  // When it throws, the load counts as failed.
  void load(int expert, int slot, bool urgent);

  std::shared_ptr<Reader> reader_;
  std::shared_ptr<Lease::State> state_;
  int64_t expert_bytes_ = 0;
};

}  // namespace glm_fused::slots
