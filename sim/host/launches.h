// The simulated host's settings, its compiled shaders and its launches.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "sim/host/executor.h"

namespace sim_host {

// A compiler gets a library's name and its shader text. It gives the path of
// the compiled library and what its kernels' names begin with. An empty path
// stands for a library whose kernels are not run; their launches are only
// noted.
using Compile = std::function<
    std::pair<std::string, std::string>(std::string, std::string)>;

struct Settings {
  std::shared_ptr<const Compile> compile;
  uint32_t workers = 1;
  // Launches run on the arrays' own memory, which serves large weights, and not
  // on copies that end at guard pages.
  bool in_place = false;
  // Launches remember what their output arrays hold afterwards.
  bool keep_outputs = false;
  // The GPU's, as Metal names it.
  std::string architecture = "applegpu_g15s";
  // Every configuration is another device's, whose kernels are its own.
  int device = 0;
};
void configure(Settings settings);
Settings settings();

struct Library {
  sim_library* opened;  // null: its kernels are not run
  std::string prefix;
};
// Returns the library that `compile` gives for the builder's text. It lives for
// ever.
const Library* library(
    const std::string& name,
    const std::function<std::string()>& builder);

// Is called where an op begins to encode its launches on this thread; `inputs`
// are the allocations of its inputs.
void begin_op(const std::vector<const void*>& inputs);
// Sets all bits of `size` bytes at `data`, in a new array of the op, which is
// NaN, or -1. What nothing has written is then no number that happens to be
// right.
void fill_new(const void* allocation, void* data, size_t size);

struct Launch {
  std::string kernel;
  uint32_t groups[3];
  uint32_t group[3];
  sim_report* report;                  // null where the kernel was not run
  std::map<int, std::string> outputs;  // the bytes, by buffer index
};

// Counts command buffers whose end the host is told of, and takes the count.
void count_wait();
int take_waits();

// Remembers a finished launch until take() hands it and its report over.
void keep(Launch launch);
std::vector<Launch> take();

}  // namespace sim_host
