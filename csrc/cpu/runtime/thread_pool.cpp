#include "cpu/runtime/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "cpu/runtime/pool.h"

namespace glm_fused::cpu {

namespace {

constexpr double kMinParallelWork = 1 << 15;

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
  if (!Pool::in_region()) {
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
