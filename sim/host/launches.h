// The simulated host's settings, its compiled shaders and its launches.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "sim/host/executor.h"

namespace sim_host {

// Library name and shader text in, path of the compiled library out.
using Compile = std::function<std::string(std::string, std::string)>;

struct Settings {
  std::string variant;  // libraries are kept by name and variant
  Compile compile;
  uint32_t workers = 1;
};
void configure(Settings settings);
uint32_t workers();

// The library compiled from the builder's text on first use.
sim_library* library(
    const std::string& name,
    const std::function<std::string()>& builder);

struct Launch {
  std::string kernel;
  uint32_t groups[3];
  uint32_t group[3];
  sim_report* report;
};

// Remembers a finished launch until take() hands it and its report over.
void keep(Launch launch);
std::vector<Launch> take();

}  // namespace sim_host
