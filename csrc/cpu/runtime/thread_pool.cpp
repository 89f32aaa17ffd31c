#include "cpu/runtime/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
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

// Decode steps follow one another within microseconds: a worker spins about
// that long before it sleeps.
constexpr int kSpins = 4000;

constexpr double kMinParallelWork = 1 << 17;

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
      : workers_(start_threads("the CPU kernels", threads - 1, [this] {
          work(1 + started_.fetch_add(1, std::memory_order_relaxed));
        })) {}

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
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
    count_ = count;
    limit_ = workers;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    drain(0);
    while (busy_.load(std::memory_order_acquire) != 0) {
      relax();
    }
    if (error_) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

 private:
  void drain(int worker) noexcept {
    for (int64_t i;
         (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      try {
        (*task_)(static_cast<int>(i), worker);
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) {
          error_ = std::current_exception();
        }
        next_.store(count_, std::memory_order_relaxed);  // leaves the rest out
      }
    }
  }

  void work(int worker) {
    uint64_t seen = 0;
    while (true) {
      for (int i = 0; i < kSpins && generation_.load() == seen; i++) {
        relax();
      }
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) {
        return;
      }
      if (worker < limit_) {
        drain(worker);
      }
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> busy_{0};
  std::atomic<int> started_{0};
  int64_t count_ = 0;
  int limit_ = 0;  // workers from this number on take no part
  const TaskRef* task_ = nullptr;
  std::exception_ptr error_;  // what a task of this region threw first
  bool stop_ = false;
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
  if (count > 1 && work >= kMinParallelWork && workers > 1) {
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
