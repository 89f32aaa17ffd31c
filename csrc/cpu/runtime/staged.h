// Kernels whose work other kernels' work can run beside.
#pragma once

#include "cpu/runtime/thread_pool.h"

namespace glm_fused::cpu {

// A kernel in stages, one after the other. A stage's tiles may be taken in any
// order, by several threads at once.
class Staged {
 public:
  struct Stage {
    int tiles;
    double work;  // of all of them, in multiply-adds
  };

  Staged() = default;
  Staged(const Staged&) = default;
  Staged(Staged&&) = default;
  virtual ~Staged() = default;

  virtual int stages() const = 0;
  // Does what comes before the stage's tiles, on one thread.
  virtual Stage begin(int stage) = 0;
  virtual void tile(int stage, int number, int worker) = 0;

  // Runs the stages on at most `workers` threads.
  void run_stages(int workers) {
    const int count = stages();
    for (int s = 0; s < count; s++) {
      const Stage stage = begin(s);
      const auto task = [&](int i, int worker) { tile(s, i, worker); };
      parallel_for(stage.tiles, task, stage.work, workers);
    }
  }
};

}  // namespace glm_fused::cpu
