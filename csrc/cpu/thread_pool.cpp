#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

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

int checked(long n, const std::string& from) {
  if (n < 1 || n > 1024) {
    throw std::invalid_argument(
        from + " must be between 1 and 1024 threads but is " +
        std::to_string(n) + ".");
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
  return checked(*end ? 0 : n, "GLM_FUSED_NUM_THREADS=" + std::string(text));
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; i++) {
      workers_.emplace_back([this] { work(); });
    }
  }

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

  void run(int count, const std::function<void(int)>& task) {
    task_ = &task;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    drain();
    while (busy_.load(std::memory_order_acquire) != 0) {
      relax();
    }
  }

 private:
  void drain() {
    for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
      (*task_)(i);
    }
  }

  void work() {
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
      drain();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> next_{0};
  std::atomic<int> busy_{0};
  int count_ = 0;
  const std::function<void(int)>* task_ = nullptr;
  bool stop_ = false;
};

std::mutex region;           // held for the whole of a parallel region
std::unique_ptr<Pool> pool;  // guarded by `region`
int threads = 0;             // guarded by `region`; 0: not decided yet

// A forked child has the parent's memory but none of its threads.
void forget_pool_in_child() {
  pool.release();
  region.unlock();
}

Pool& current_pool() {
  if (threads == 0) {
    threads = default_threads();
  }
  if (!pool) {
    static const int registered = pthread_atfork(
        [] { region.lock(); }, [] { region.unlock(); }, forget_pool_in_child);
    static_cast<void>(registered);
    pool = std::make_unique<Pool>(threads);
  }
  return *pool;
}

// The pool must not outlive the process's other statics or be joined from a
// library unload: it is leaked at exit.
struct LeakAtExit {
  ~LeakAtExit() {
    pool.release();
  }
} leak_at_exit;

}  // namespace

void parallel_for(
    int count,
    const std::function<void(int)>& task,
    double work) {
  if (count > 1 && work >= kMinParallelWork) {
    std::lock_guard lock(region);
    Pool& p = current_pool();
    if (p.threads() > 1) {
      p.run(count, task);
      return;
    }
  }
  for (int i = 0; i < count; i++) {
    task(i);
  }
}

int num_threads() {
  std::lock_guard lock(region);
  return current_pool().threads();
}

void set_num_threads(int n) {
  checked(n, "[set_num_threads] n");
  std::lock_guard lock(region);
  threads = n;
  pool.reset();
}

}  // namespace glm_fused::cpu
