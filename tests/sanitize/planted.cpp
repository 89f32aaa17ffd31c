// Bugs for the sanitizers to find, in instrumented builds of the extension
// alone: a run that finds none of them proves nothing.
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "cpu/runtime/scratch.h"
#include "cpu/runtime/thread_pool.h"

extern "C" __attribute__((visibility("default"))) int glm_fused_plant(
    const char* bug) {
  const std::string name = bug;
  int shared = 0;
  std::atomic<int> begun{0};
  volatile int shift = 40;
  const auto block = glm_fused::cpu::scratch_block(
      mlx::core::Stream(0, mlx::core::Device::cpu), 0, 1024);
  glm_fused::cpu::Scratch scratch(block.get(), 1024);
  // The address past a span, which the standard library's own check would stop.
  const std::span<int> first = scratch.take<int>(3);
  const std::span<int> second = scratch.take<int>(3);
  int* between = first.data() + first.size();
  std::vector<int> memory(4);
  int* past = memory.data() + memory.size();
  glm_fused::cpu::set_num_threads(4);
  glm_fused::cpu::parallel_for(
      4096,
      [&](int) {
        if (name == "race") {
          // Two threads have to be here: on a busy machine one might run all.
          for (begun++; begun < 2;) {
            std::this_thread::yield();
          }
          shared++;
        } else if (name == "overflow") {
          *past = 1;
        } else if (name == "scratch") {
          *between = second[0] = 1;
        } else if (name == "shift") {
          shared = 1 << shift;
        }
      },
      1e9,
      glm_fused::cpu::num_threads());
  return shared;
}
