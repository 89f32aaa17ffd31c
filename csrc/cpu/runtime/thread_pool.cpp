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

  // Throws what a task threw first, once no worker runs any more.
  void run(int count, const TaskRef& task, int workers) {
    task_ = &task;
    limit_ = std::min(workers, threads());
    for (int64_t w = 0; w < limit_; w++) {
      Share& share = shares_[w];
      share.next.store(w * count / limit_, std::memory_order_relaxed);
      share.end = (w + 1) * count / limit_;
    }
    const uint64_t region = (region_.load() / kRegion + 1) * kRegion;
    region_.store(region | kOpen);
    if (asleep_.load() > 0) {
      std::lock_guard lock(mutex_);
      wake_.notify_all();
    }
    drain(0);
    // Who has not come by now is too late; the others are waited for.
    region_.fetch_and(~kOpen);
    while (region_.load(std::memory_order_acquire) != region) {
      relax();
    }
    if (error_) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

 private:
  // A region's number, whether workers may join it, and how many are in it.
  static constexpr uint64_t kOpen = 1 << 16, kRegion = kOpen << 1;

  // What is left of a thread's tasks.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  // Each thread has a share of the tasks, the same one whenever as many are
  // done, so that what they read may still be in its core's cache. Then it
  // takes what is left of the others'.
  void drain(int worker) noexcept {
    in_region = true;
    for (int i = 0; i < limit_; i++) {
      drain(shares_[(worker + i) % limit_], worker);
    }
    in_region = false;
  }

  void drain(Share& share, int worker) noexcept {
    for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) <
         share.end;) {
      try {
        (*task_)(static_cast<int>(i), worker);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) {
          error_ = std::current_exception();
        }
        for (Share& other : shares_) {  // leaves the rest out
          other.next.store(other.end, std::memory_order_relaxed);
        }
      }
    }
  }

  // Whether there is a region that a worker has not seen yet.
  bool is_new(uint64_t seen) const {
    const uint64_t region = region_.load();
    return (region & kOpen) != 0 && region / kRegion != seen;
  }

  // Returns whether a region came within the time that a worker spins.
  bool spin(uint64_t seen) const {
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

  // Returns whether the region could be joined, as long as it was open.
  bool join(uint64_t& seen) {
    uint64_t region = region_.load();
    do {
      if ((region & kOpen) == 0 || region / kRegion == seen) {
        return false;
      }
    } while (!region_.compare_exchange_weak(region, region + 1));
    seen = region / kRegion;
    return true;
  }

  void work(int worker) {
    uint64_t seen = 0;
    while (!stop_) {
      if (!spin(seen)) {
        asleep_.fetch_add(1);
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || is_new(seen); });
        asleep_.fetch_sub(1);
      } else if (join(seen)) {
        if (worker < limit_) {
          drain(worker);
        }
        region_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> region_{0};
  std::atomic<int> asleep_{0};
  std::vector<Share> shares_;
  std::atomic<int> started_{0};
  int limit_ = 0;  // workers from this number on take no part
  const TaskRef* task_ = nullptr;
  std::exception_ptr error_;  // what a task of this region threw first
  std::atomic<bool> stop_{false};
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

void parallel_for(int count, TaskRef task, double work, int workers) {
  if (count > 1 && work >= kMinParallelWork && workers > 1 && !in_region) {
    Shared& s = shared();
    std::lock_guard lock(s.region);
    if (s.pool && s.pool->threads() > 1) {
      s.pool->run(count, task, workers);
      return;
    }
  }
  for (int i = 0; i < count; i++) {
    task(i, 0);
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
