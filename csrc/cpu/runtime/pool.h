// The threads of the CPU kernels. thread_pool.h is how kernels use them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/runtime/thread_pool.h"

namespace glm_fused::cpu {

class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();

  int threads() const {
    return static_cast<int>(workers_.size()) + 1;
  }

  // Whether this thread runs a task of a region. Another cannot begin within
  // it.
  static bool in_region();

  // Runs the regions that `next` gives, one after the other, then throws what a
  // task threw first.
  void run(const NextRegion& next);

 private:
  static constexpr int kMostTasks = (1 << 20) - 1;  // of an open region
  // Of more tasks so many are one.
  static constexpr int kTasksAsOne = 1 << 12;

  // What a thread has to know before it takes a task, in one word: to hand over
  // a cache line takes a quarter of a microsecond.
  struct Open {
    uint32_t number;
    int threads;  // that take part: those of lower numbers
    int count;

    uint64_t word() const {
      return uint64_t{number} << 32 | uint64_t(threads) << 20 | uint64_t(count);
    }
    static Open of(uint64_t word) {
      return {
          static_cast<uint32_t>(word >> 32),
          static_cast<int>(word >> 20 & 0xfff),
          static_cast<int>(word & kMostTasks)};
    }
    // The first task of a thread's share.
    int first(int thread) const {
      return static_cast<int>(int64_t{thread} * count / threads);
    }
    uint64_t tagged(int value) const {
      return uint64_t{number} << 32 | static_cast<uint32_t>(value);
    }
    // Below 0 for a word of an earlier region, above for one of a later one.
    int32_t age_of(uint64_t word) const {
      return static_cast<int32_t>(static_cast<uint32_t>(word >> 32) - number);
    }
  };

  // The first task of a thread's share that is not taken. The word begins with
  // a region's number: of an earlier one, none is taken.
  struct alignas(64) Share {
    std::atomic<uint64_t> next{0};
  };

  bool is_done(const Open& region) const;
  bool claims_next(const Open& region);
  void go_on() noexcept;
  void take_part(const Open& region, int worker);
  int drain(const Open& region, int worker) noexcept;
  int drain(const Open& region, int share, int worker) noexcept;
  void run_task(int i, int worker) noexcept;
  bool is_new(uint32_t seen) const;
  bool spin(uint32_t seen) const;
  void work(int worker);

  std::mutex mutex_;
  std::condition_variable wake_;
  // The open region, and on its line what a thread needs that took a task.
  alignas(64) std::atomic<uint64_t> region_{0};
  TaskRef task_;
  int count_ = 0, as_one_ = 1;
  alignas(64) std::atomic<int> done_{0};  // how many of its tasks are
  alignas(64) std::atomic<bool> over_{true};
  // Regions that were gone on from.
  alignas(64) std::atomic<uint32_t> claimed_{0};
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic<bool> stop_{false}, failed_{false};
  const NextRegion* next_ = nullptr;
  std::vector<Share> shares_;
  std::atomic<int> started_{0};
  uint32_t number_ = 0;               // of the last region
  std::exception_ptr error_;          // what a task threw first
  std::vector<std::thread> workers_;  // comes last, as they use the others
};

}  // namespace glm_fused::cpu
