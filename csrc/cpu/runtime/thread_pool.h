// The extension has its own threads, because MLX runs a CPU op on one.
#pragma once

#include <memory>
#include <type_traits>

namespace glm_fused::cpu {

// Refers to a task(i) or task(i, worker), which has to outlive the call that it
// is handed to.
class TaskRef {
 public:
  TaskRef() = default;
  template <
      class Task,
      class = std::enable_if_t<!std::is_same_v<std::decay_t<Task>, TaskRef>>>
  TaskRef(const Task& task)
      : task_(std::addressof(task)),
        call_([](const void* at, int i, int worker) {
          const Task& task = *static_cast<const Task*>(at);
          if constexpr (std::is_invocable_v<const Task&, int, int>) {
            task(i, worker);
          } else {
            static_cast<void>(worker);
            task(i);
          }
        }) {}

  void operator()(int i, int worker) const {
    call_(task_, i, worker);
  }

 private:
  const void* task_ = nullptr;
  void (*call_)(const void*, int, int) = nullptr;
};

// What may be done at the same time: task(i) for every i in [0, count). `work`,
// in multiply-adds, tells whether waking the pool is worth it; `workers` bounds
// how many threads take part.
struct Region {
  int count = 0;
  TaskRef task;
  double work = 0;
  int workers = 1;
};

// Refers to a next(region), which says what is to be done next and returns
// true, or returns false.
class NextRegion {
 public:
  template <
      class Next,
      class = std::enable_if_t<!std::is_same_v<std::decay_t<Next>, NextRegion>>>
  NextRegion(const Next& next)
      : next_(std::addressof(next)), call_([](const void* at, Region& region) {
          return (*static_cast<const Next*>(at))(region);
        }) {}

  bool operator()(Region& region) const {
    return call_(next_, region);
  }

 private:
  const void* next_;
  bool (*call_)(const void*, Region&);
};

// Runs regions one after the other, each as parallel_for does, until there are
// no more. `next` is called by one thread at a time, but not always the same,
// and no parallel region can begin within it. Neither it nor a task may throw.
void parallel_chain(NextRegion next);

// Calls task(i) for every i in [0, count), in any order, on the pool and the
// calling thread; returns when all are done. Regions run one at a time, so
// several MLX streams never oversubscribe the processor. `work`, in
// multiply-adds, tells whether waking the pool is worth it. Throws what a task
// threw first, after the tasks that had begun have ended; others are left out.
// task(i, worker) knows its thread's number: the caller's is 0, and all are
// below `workers`, which bounds how many take part. Without a pool, and within
// a task, the caller runs all tasks.
void parallel_for(int count, TaskRef task, double work, int workers);

// Returns how many threads the pool has, and starts it: fewer than asked for
// where the system gives no more. Throws std::bad_alloc.
int num_threads();

// Sets how many threads the pool is to have. Throws std::invalid_argument
// unless 1 <= n <= 1024.
void set_num_threads(int n);

}  // namespace glm_fused::cpu
