// The executor's functions are found at run time, because the extension must
// import without it.
#pragma once

#include <string>

#include "sim/runtime/executor.h"

namespace sim_host {

struct Executor {
  decltype(&sim_open) open;
  decltype(&sim_specialize) specialize;
  decltype(&sim_most_threads) most_threads;
  decltype(&sim_launch) launch;
  decltype(&sim_report_error) error;
  decltype(&sim_report_counts) counts;
};

// Loads the shared object at `path`, its symbols global for the shaders.
void load_executor(const std::string& path);
const Executor& executor();

}  // namespace sim_host
