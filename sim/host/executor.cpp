#include "sim/host/executor.h"

#include <dlfcn.h>

#include <stdexcept>

namespace sim_host {

namespace {

Executor loaded{};

template <class F>
void find(void* handle, F& function, const char* name) {
  function = reinterpret_cast<F>(dlsym(handle, name));
  if (function == nullptr) {
    throw std::runtime_error(std::string("[metal-sim] ") + dlerror());
  }
}

}  // namespace

void load_executor(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (handle == nullptr) {
    throw std::runtime_error(std::string("[metal-sim] ") + dlerror());
  }
  find(handle, loaded.open, "sim_open");
  find(handle, loaded.specialize, "sim_specialize");
  find(handle, loaded.most_threads, "sim_most_threads");
  find(handle, loaded.launch, "sim_launch");
  find(handle, loaded.error, "sim_report_error");
  find(handle, loaded.counts, "sim_report_counts");
}

const Executor& executor() {
  if (loaded.open == nullptr) {
    throw std::runtime_error("[metal-sim] the executor is not loaded");
  }
  return loaded;
}

}  // namespace sim_host
