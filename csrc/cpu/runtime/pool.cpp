#include "cpu/runtime/pool.h"

#include <algorithm>
#include <chrono>
#include <utility>

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

thread_local bool in_region_now = false;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads)
    : shares_(threads),
      workers_(start_threads("the CPU kernels", threads - 1, [this] {
        work(1 + started_.fetch_add(1, std::memory_order_relaxed));
      })) {}

Pool::~Pool() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) {
    worker.join();
  }
}

bool Pool::in_region() {
  return in_region_now;
}

void Pool::run(const NextRegion& next) {
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

bool Pool::is_done(const Open& region) const {
  return done_.load(std::memory_order_acquire) == region.count;
}

// Whether this thread is the one to open what comes after a region.
bool Pool::claims_next(const Open& region) {
  uint32_t before = region.number - 1;
  return claimed_.compare_exchange_strong(before, region.number);
}

// Opens the next region, or ends the run.
void Pool::go_on() noexcept {
  Region region;
  in_region_now = true;
  const bool more = (*next_)(region);
  in_region_now = false;
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
void Pool::take_part(const Open& region, int worker) {
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

// Each thread has a share of the tasks, the same one whenever as many are
// done, so that what they read may still be in its core's cache. Then it
// takes what is left of the others'. Returns how many tasks it did.
int Pool::drain(const Open& region, int worker) noexcept {
  in_region_now = true;
  int done = 0;
  for (int i = 0; i < region.threads; i++) {
    done += drain(region, (worker + i) % region.threads, worker);
  }
  in_region_now = false;
  if (done > 0) {
    done_.fetch_add(done, std::memory_order_acq_rel);
  }
  return done;
}

// A region ends when all of its tasks are done. So who could take one finds
// what that region's tasks need, and who comes too late finds none.
int Pool::drain(const Open& region, int share, int worker) noexcept {
  std::atomic<uint64_t>& next = shares_[share].next;
  const int end = region.first(share + 1);
  int done = 0;
  for (uint64_t word = next.load(std::memory_order_relaxed);;) {
    const int32_t age = region.age_of(word);
    const int i = age < 0 ? region.first(share) : static_cast<int>(word);
    if (age > 0 || i >= end) {
      return done;
    }
    if (next.compare_exchange_weak(
            word, region.tagged(i + 1), std::memory_order_relaxed)) {
      run_task(i, worker);
      done++;
      word = next.load(std::memory_order_relaxed);
    }
  }
}

void Pool::run_task(int i, int worker) noexcept {
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
bool Pool::is_new(uint32_t seen) const {
  return Open::of(region_.load()).number != seen;
}

// Returns whether a region came within the time that a worker spins.
bool Pool::spin(uint32_t seen) const {
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

void Pool::work(int worker) {
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

}  // namespace glm_fused::cpu
