// Tasks throw, from many threads, in pools of any size, under sanitizers too
// (tests/test_crashes.py, tests/sanitize). With an argument, a task plants a
// bug for them: "race" writes what another reads, "overflow" writes past its
// memory, "shift" shifts by more than an int has bits.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/runtime/thread_pool.h"

using glm_fused::cpu::num_threads;
using glm_fused::cpu::parallel_chain;
using glm_fused::cpu::parallel_for;
using glm_fused::cpu::Region;

namespace {

constexpr double kWork = 1e9;  // enough for the pool

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
  }
}

// Runs tasks that count themselves, of which some throw. All that began have
// ended when it returns, as their counts, which are no atomics, show.
void region(int count, int thrower, int throwers, int workers) {
  std::vector<int> done(count);
  bool thrown = false;
  try {
    parallel_for(
        count,
        [&](int i) {
          done[i]++;
          if (i >= thrower && i < thrower + throwers) {
            if (i % 2) {
              throw std::bad_alloc();
            }
            throw std::runtime_error("task " + std::to_string(i));
          }
        },
        kWork,
        workers);
  } catch (const std::bad_alloc&) {
    thrown = true;
  } catch (const std::runtime_error& error) {
    thrown = !std::strncmp(error.what(), "task ", 5);
  }
  const bool throws = throwers > 0 && thrower < count;
  require(thrown == throws, "an exception is lost or made up");
  for (int n : done) {
    require(n <= 1 && (throws || n == 1), "a task ran twice or never");
  }
}

// Runs regions one after the other; each adds one to what the one before left,
// and no counts are atomics.
void chain(int regions, int workers) {
  std::vector<int> counts(40);
  int given = 0;
  const auto task = [&](int i) {
    require(counts[i] == given - 1, "a region began before the last one ended");
    counts[i]++;
  };
  const auto next = [&](Region& region) {
    for (int n : counts) {
      require(n == given, "a task ran twice or never");
    }
    const double work = given % 5 ? kWork : 0;  // not all are worth the pool
    region = {static_cast<int>(counts.size()), task, work, workers};
    return given++ < regions;
  };
  parallel_chain(next);
  require(given == regions + 1, "a chain ended early");
}

void plant(const char* bug) {
  int shared = 0, shift = 40;
  std::vector<int> memory(4);
  int* past = memory.data() + memory.size();
  std::atomic<int> begun{0};
  parallel_for(
      64,
      [&](int) {
        if (!std::strcmp(bug, "race")) {
          // Two threads have to be here: on a busy machine one might run all.
          for (begun++; begun < 2;) {
            std::this_thread::yield();
          }
          shared++;
        } else if (!std::strcmp(bug, "overflow")) {
          *past = 1;
        } else {
          shared = 1 << shift;
        }
      },
      kWork,
      num_threads());
  std::printf("%d\n", shared);
}

}  // namespace

int main(int count, char** argv) {
  glm_fused::cpu::set_num_threads(4);
  if (count > 1) {
    plant(argv[1]);
    return 0;
  }
  for (int threads : {1, 2, 5}) {
    glm_fused::cpu::set_num_threads(threads);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; caller++) {
      callers.emplace_back([caller, threads] {
        for (int i = 0; i < 3000; i++) {
          const int workers = i % 3 ? threads : 1 + i % threads;
          region(i % 40, (i + caller) % 37, i % 4, workers);
          chain(i % 7, workers);
        }
      });
    }
    const int more_than_a_region_has = (1 << 20) + 5;
    region(more_than_a_region_has, more_than_a_region_has, 1, threads);
    region(more_than_a_region_has, more_than_a_region_has - 3, 1, threads);
    for (auto& caller : callers) {
      caller.join();
    }
  }
  std::printf("fine\n");
}
