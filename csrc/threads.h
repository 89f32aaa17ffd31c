// A pool starts as many threads as the system gives.
#pragma once

#include <cstdio>
#include <exception>
#include <thread>
#include <vector>

namespace glm_fused {

// Starts up to `count` threads that run `work`. Where the system refuses one
// (limits of memory or of processes), it returns those that run and says so on
// stderr: fewer threads are slower and change nothing else.
template <class Work>
std::vector<std::thread>
start_threads(const char* what, int count, const Work& work) {
  std::vector<std::thread> threads;
  threads.reserve(count);
  try {
    while (static_cast<int>(threads.size()) < count) {
      threads.emplace_back(work);
    }
  } catch (const std::exception& error) {
    std::fprintf(
        stderr,
        "glm_fused: %d of %d threads for %s could be created (%s).\n",
        static_cast<int>(threads.size()),
        count,
        what,
        error.what());
  }
  return threads;
}

}  // namespace glm_fused
