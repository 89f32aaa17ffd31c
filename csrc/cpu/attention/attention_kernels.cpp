#include "cpu/attention/attention_kernels.h"

#include <string>

#include "cpu/dot/dot_kernels.h"
#include "cpu/runtime/thread_pool.h"

namespace glm_fused::cpu {

const AttentionKernels& attention_kernels() {
#if defined(__x86_64__)
  const std::string name = kernels().name;
  if (name == "avx512") {
    return avx512_attention();
  }
  if (name == "avx2") {
    return avx2_attention();
  }
#endif
  return portable_attention();
}

double multiply_adds(int64_t rounds) {
  const int threads = num_threads();
  int per_round = 0;
  const auto task = [&](int i) {
    float result = 0.5f;
    const int done = attention_kernels().multiply_adds(rounds, &result);
    if (i == 0) {
      per_round = result == 0 ? 0 : done;
    }
  };
  parallel_for(threads, task, 1e9, threads);
  return static_cast<double>(per_round) * rounds * threads;
}

}  // namespace glm_fused::cpu
