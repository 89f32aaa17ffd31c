#include "cpu/runtime/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace glm_fused::cpu {

namespace {

// The regions of a decode step, and its steps, follow one another within
// microseconds: a worker spins so long before it sleeps.
constexpr auto kSpin = std::chrono::microseconds(200);
constexpr int kSpinsAtOnce = 64;  // before it looks at the clock

constexpr double kMinParallelWork = 1 << 15;

// Whether this thread runs a task of a region. Another cannot begin within it.
thread_local bool in_region = false;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return CPU_COUNT(&set);
  }
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

int checked(long n, const std::string& name, const std::string& found) {
  if (n < 1 || n > 1024) {
    throw std::invalid_argument(
        name + " must be between 1 and 1024 threads but is " + found + ".");
  }
  return static_cast<int>(n);
}

int default_threads() {
  const char* text = std::getenv("GLM_FUSED_NUM_THREADS");
  if (text == nullptr || *text == '\0') {
    return usable_processors();
  }
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  const std::string found = "'" + std::string(text) + "'";
  return checked(*end ? 0 : n, "GLM_FUSED_NUM_THREADS", found);
}

class Pool {
 public:
  explicit Pool(int threads)
      : shares_(threads),
        workers_(start_threads("the CPU kernels", threads - 1, [this] {
          work(1 + started_.fetch_add(1, std::memory_order_relaxed));
        })) {}

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) {
      worker.join();
    }
  }

  int threads() const {
    return static_cast<int>(workers_.size()) + 1;
  }

  // Runs the regions that `next` gives, one after the other, then throws what a
  // task threw first.
  void run(const NextRegion& next) {
    next_ = &next;
    over_.store(false, std::memory_order_relaxed);
    Open region = Open::of(region_.load());
    go_on();
    while (!over_.load(std::memory_order_acquire)) {
      if (is_new(region.number)) {
        region = Open::of(region_.load());
        drain(region, 0);
      } else if (is_done(region) && claims_next(region)) {
        go_on();
      } else {
        relax();
      }
    }
    if (failed_.load(std::memory_order_relaxed)) {
      failed_.store(false, std::memory_order_relaxed);
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

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
  };

  bool is_done(const Open& region) const {
    return done_.load(std::memory_order_acquire) == region.count;
  }

  // Whether this thread is the one to open what comes after a region.
  bool claims_next(const Open& region) {
    uint32_t before = region.number - 1;
    return claimed_.compare_exchange_strong(before, region.number);
  }

  // Opens the next region, or ends the run.
  void go_on() noexcept {
    Region region;
    in_region = true;
    const bool more = (*next_)(region);
    in_region = false;
    if (!more) {
      over_.store(true, std::memory_order_release);
      return;
    }
    task_ = region.task;
    count_ = region.count;
    as_one_ = count_ > kMostTasks ? kTasksAsOne : 1;
    done_.store(0, std::memory_order_relaxed);
    const Open open = {
        ++number_,
        std::min(region.workers, threads()),
        (count_ - 1) / as_one_ + 1};
    region_.store(open.word());
    if (asleep_.load() > 0) {
      std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
  }

  // A worker's part. The thread that called `run` opens the regions, as what
  // that takes is in its core's cache; but if it does not come, because the
  // system has put it aside, who did the last task goes on in its place.
  void take_part(const Open& region, int worker) {
    if (worker >= region.threads || drain(region, worker) == 0 ||
        !is_done(region)) {
      return;
    }
    for (int i = 0; i < kSpinsAtOnce; i++) {
      if (is_new(region.number)) {
        return;
      }
      relax();
    }
    if (is_done(region) && claims_next(region)) {
      go_on();
    }
  }

  // The first task of a thread's share that is not taken. The word begins with
  // a region's number: of an earlier one, none is taken.
  struct alignas(64) Share {
    std::atomic<uint64_t> next{0};
  };

  static uint64_t tagged(const Open& region, int value) {
    return uint64_t{region.number} << 32 | static_cast<uint32_t>(value);
  }
  // Below 0 for an earlier region, above for a later one.
  static int32_t tag_minus(uint64_t word, const Open& region) {
    return static_cast<int32_t>(
        static_cast<uint32_t>(word >> 32) - region.number);
  }

  // Each thread has a share of the tasks, the same one whenever as many are
  // done, so that what they read may still be in its core's cache. Then it
  // takes what is left of the others'. Returns how many tasks it did.
  int drain(const Open& region, int worker) noexcept {
    in_region = true;
    int done = 0;
    for (int i = 0; i < region.threads; i++) {
      done += drain(region, (worker + i) % region.threads, worker);
    }
    in_region = false;
    if (done > 0) {
      done_.fetch_add(done, std::memory_order_acq_rel);
    }
    return done;
  }

  // A region ends when all of its tasks are done. So who could take one finds
  // what that region's tasks need, and who comes too late finds none.
  int drain(const Open& region, int share, int worker) noexcept {
    std::atomic<uint64_t>& next = shares_[share].next;
    const int end = region.first(share + 1);
    int done = 0;
    for (uint64_t word = next.load(std::memory_order_relaxed);;) {
      const int32_t age = tag_minus(word, region);
      const int i = age < 0 ? region.first(share) : static_cast<int>(word);
      if (age > 0 || i >= end) {
        return done;
      }
      if (next.compare_exchange_weak(
              word, tagged(region, i + 1), std::memory_order_relaxed)) {
        run_task(i, worker);
        done++;
        word = next.load(std::memory_order_relaxed);
      }
    }
  }

  void run_task(int i, int worker) noexcept {
    if (failed_.load(std::memory_order_relaxed)) {
      return;
    }
    try {
      const int end = std::min(count_, (i + 1) * as_one_);
      for (int task = i * as_one_; task < end; task++) {
        task_(task, worker);
      }
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) {
        error_ = std::current_exception();
      }
      failed_.store(true, std::memory_order_relaxed);
    }
  }

  // Whether there is a region that a worker has not seen yet.
  bool is_new(uint32_t seen) const {
    return Open::of(region_.load()).number != seen;
  }

  // Returns whether a region came within the time that a worker spins.
  bool spin(uint32_t seen) const {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < kSpinsAtOnce; i++) {
        if (is_new(seen)) {
          return true;
        }
        relax();
      }
    } while (!stop_ && std::chrono::steady_clock::now() < end);
    return false;
  }

  void work(int worker) {
    uint32_t seen = 0;
    while (!stop_) {
      if (!spin(seen)) {
        asleep_.fetch_add(1);
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || is_new(seen); });
        asleep_.fetch_sub(1);
        continue;
      }
      const Open region = Open::of(region_.load());
      seen = region.number;
      take_part(region, worker);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  // The open region, and on its line what a thread needs that took a task.
  alignas(64) std::atomic<uint64_t> region_{0};
  TaskRef task_;
  int count_ = 0, as_one_ = 1;
  alignas(64) std::atomic<int> done_{0};  // how many of its tasks are
  alignas(64) std::atomic<bool> over_{true};
  alignas(64) std::atomic<uint32_t> claimed_{
      0};  // regions that were gone on from
  alignas(64) std::atomic<int> asleep_{0};
  std::atomic<bool> stop_{false}, failed_{false};
  const NextRegion* next_ = nullptr;
  std::vector<Share> shares_;
  std::atomic<int> started_{0};
  uint32_t number_ = 0;               // of the last region
  std::exception_ptr error_;          // what a task threw first
  std::vector<std::thread> workers_;  // comes last, as they use the others
};

struct Shared {
  std::mutex region;           // held for the whole of a parallel region
  std::unique_ptr<Pool> pool;  // guarded by `region`
  int threads = 0;             // guarded by `region`; 0: not decided yet
  // The pool's number of threads, 0 without one; it may be read while a region
  // runs.
  std::atomic<int> running{0};
};

// This is never destroyed, as MLX's threads may still compute while the process
// ends.
Shared& shared() {
  static Shared& shared = *new Shared;
  return shared;
}

// A forked child has the parent's memory but none of its threads.
void forget_pool_in_child() {
  static_cast<void>(shared().pool.release());
  shared().running = 0;
  shared().region.unlock();
}

void start_pool(Shared& s) {
  if (s.threads == 0) {
    s.threads = default_threads();
  }
  static const int registered = pthread_atfork(
      [] { shared().region.lock(); },
      [] { shared().region.unlock(); },
      forget_pool_in_child);
  static_cast<void>(registered);
  s.pool = std::make_unique<Pool>(s.threads);
  s.running = s.pool->threads();
}

}  // namespace

namespace {

// Whether a region is worth the pool.
bool is_worth_it(const Region& region) {
  return region.count > 1 && region.work >= kMinParallelWork &&
      region.workers > 1;
}

void run_here(const Region& region) {
  for (int i = 0; i < region.count; i++) {
    region.task(i, 0);
  }
}

}  // namespace

void parallel_chain(NextRegion next) {
  const auto next_for_pool = [&](Region& region) {
    while (next(region)) {
      if (is_worth_it(region)) {
        return true;
      }
      run_here(region);
    }
    return false;
  };
  if (!in_region) {
    Shared& s = shared();
    std::lock_guard lock(s.region);
    if (s.pool && s.pool->threads() > 1) {
      s.pool->run(next_for_pool);
      return;
    }
  }
  for (Region region; next(region);) {
    run_here(region);
  }
}

void parallel_for(int count, TaskRef task, double work, int workers) {
  const Region whole = {count, task, work, workers};
  if (is_worth_it(whole)) {
    bool given = false;
    parallel_chain([&](Region& region) {
      region = whole;
      return !std::exchange(given, true);
    });
  } else {
    run_here(whole);
  }
}

int num_threads() {
  Shared& s = shared();
  if (const int running = s.running) {
    return running;
  }
  std::lock_guard lock(s.region);
  if (!s.pool) {
    start_pool(s);
  }
  return s.pool->threads();
}

void set_num_threads(int n) {
  checked(n, "[set_num_threads] n", std::to_string(n));
  Shared& s = shared();
  std::lock_guard lock(s.region);
  s.threads = n;
  s.running = 0;
  s.pool.reset();
}

}  // namespace glm_fused::cpu
