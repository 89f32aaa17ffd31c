// The extension's own threads: MLX's CPU ops run on one.
#pragma once

#include <functional>

namespace glm_fused::cpu {

// Calls task(i) for every i in [0, count), in any order, on the pool and the
// calling thread; returns when all are done. Regions run one at a time, so
// several MLX streams never oversubscribe the processor. `work`, in
// multiply-adds, tells whether waking the pool is worth it. Throws what a task
// threw first, after the tasks that had begun have ended; others are left out.
void parallel_for(int count, const std::function<void(int)>& task, double work);

// Those that run: fewer than asked for where the system gives no more.
int num_threads();

// Throws std::invalid_argument unless 1 <= n <= 1024.
void set_num_threads(int n);

}  // namespace glm_fused::cpu
