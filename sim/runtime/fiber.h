// Runs one threadgroup at a time on one OS thread, with a fiber for every GPU
// thread, which may switch at barriers and simdgroup functions.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "executor.h"
#include "memory.h"
#include "report.h"
#include "threadgroup_memory.h"

namespace sim {

class Tracer;

// This is msl_position of msl/entry.h.
struct Position {
  uint32_t threadgroup_position[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t thread_position_in_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t threads_per_grid[3];
  uint32_t thread_index, simdgroup_index, lane, simdgroups;
};

// This is msl_exchange of msl/runtime.h.
struct Exchange {
  uint32_t mask, combined, unused[2];
  uint8_t values[32 * 64];
};

// A synchronising call in the source.
struct Site {
  uint32_t op = 0, size = 0, line = 0;
  const char* file = nullptr;
  bool operator==(const Site&) const = default;
};

// Is xorshift, in which 0 stays 0.
inline uint64_t next_random(uint64_t x) {
  x ^= x << 13;
  x ^= x >> 7;
  return x ^ x << 17;
}

enum MemoryKind { kThreadgroup, kDevice };

struct Thread {
  enum State { kReady, kExchange, kBarrier, kDone } state;
  void* stack_pointer;
  Position position;
  Site site;
  const void* value;   // what it brings to an exchange
  Exchange* exchange;  // what it gets back
  // How often its memory was put in order with the threadgroup's and the
  // simdgroup's other threads.
  uint32_t group_epoch[2], simd_epoch[2];
};

// All workers of a launch share this.
struct Launch {
  const sim_kernel* kernel;
  const sim_dispatch* dispatch;
  std::string library;  // its file, and where it is loaded
  uintptr_t library_base, library_size;
  Memory* memory;
  sim_report* report;
  Tracer* tracer;  // null when untraced
  uint32_t groups[3];
};

class Stacks;

class Worker {
 public:
  Worker(const Launch& launch, uint64_t seed);
  ~Worker();
  // Runs threadgroup number `id`; false when the launch must stop.
  bool run(uint32_t id);

  // Fibers call these.
  Exchange* exchange(const Site& site, const void* value);
  void simd_barrier(const Site& site, uint32_t flags);
  void barrier(const Site& site, uint32_t flags);
  uint8_t* threadgroup_variable(uint32_t id, uint64_t size);
  // Ends the launch with an error; `pc` tells where, if it is known.
  [[noreturn]] void abandon(const std::string& problem, uintptr_t pc = 0);

  Thread& thread() {
    return *current_;
  }
  uint32_t threadgroup() const {
    return id_;
  }
  const Launch& launch() const {
    return launch_;
  }
  const ThreadgroupMemory& memory() const {
    return threadgroup_memory_;
  }
  bool on_guard_page(uint64_t address) const;
  bool on_stack(uint64_t address) const;
  // Returns whether shader code may read an address of constants or of the
  // executor's tables.
  bool owns(uint64_t address) const;

  // Returns the worker whose fiber runs on this OS thread, or null.
  static Worker* running();

  uint64_t simd_functions = 0, barriers = 0, threads_run = 0;

 private:
  struct Simdgroup {
    uint32_t first, count;
    uint32_t alive, waiting, mask;
    bool divergent;  // its waiting threads came to different calls
    Site site;
    int turn;  // of the two exchanges, which one is being filled
    Exchange exchanges[2];
  };

  const Launch& launch_;
  uint64_t random_;
  uint32_t id_ = 0;
  uint32_t alive_ = 0, at_barrier_ = 0;
  Thread* current_ = nullptr;
  void* main_stack_pointer_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<Simdgroup> simdgroups_;
  std::vector<uint32_t> ready_;
  std::deque<Exchange> partial_exchanges_;
  ThreadgroupMemory threadgroup_memory_;
  std::vector<uint64_t> group_arguments_;
  std::unique_ptr<Stacks> stacks_;

  void place(uint32_t id);
  void start();
  void make_ready(Thread& thread);
  Thread* take_ready();
  void switch_from(Thread& from);
  void complete(Simdgroup& group);
  bool complete_partially(Simdgroup& group);
  void release_barrier();
  bool unblock();
  void finish();
  void report_divergence(const Thread& at, const std::string& text);
  static void fiber();
};

}  // namespace sim
