#include "sim/host/launches.h"

#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>

namespace sim_host {

namespace {

// It is never destroyed, because `compile` is Python's, which ends first.
struct State {
  std::mutex mutex;
  Settings settings;
  std::map<std::pair<std::string, std::string>, Library> libraries;
  std::vector<Launch> launches;
  int waits = 0;
};

State& state() {
  static auto* only = new State();
  return *only;
}

// The allocations whose contents matter to the op that is being encoded.
thread_local std::set<const void*> bound;

}  // namespace

void configure(Settings settings) {
  std::lock_guard lock(state().mutex);
  settings.device = state().settings.device + 1;
  std::swap(state().settings, settings);
}

Settings settings() {
  std::lock_guard lock(state().mutex);
  return state().settings;
}

const Library* library(
    const std::string& name,
    const std::function<std::string()>& builder) {
  const auto compile = settings().compile;
  if (!compile) {
    throw std::runtime_error("[metal-sim] no shader compiler is set");
  }
  // The mutex is free here: the compiler needs Python's lock.
  const auto found = (*compile)(name, builder());
  const auto& [path, prefix] = found;
  sim_library* opened = nullptr;
  if (!path.empty()) {
    char error[4096] = "";
    opened = executor().open(path.c_str(), error, sizeof(error));
    if (opened == nullptr) {
      throw std::runtime_error("[metal-sim] " + name + ": " + error);
    }
  }
  std::lock_guard lock(state().mutex);
  return &state()
              .libraries.try_emplace(found, Library{opened, prefix})
              .first->second;
}

void begin_op(const std::vector<const void*>& inputs) {
  bound = {inputs.begin(), inputs.end()};
}

void fill_new(const void* allocation, void* data, size_t size) {
  if (bound.insert(allocation).second) {
    std::memset(data, 0xff, size);
  }
}

void count_wait() {
  std::lock_guard lock(state().mutex);
  state().waits++;
}

int take_waits() {
  std::lock_guard lock(state().mutex);
  return std::exchange(state().waits, 0);
}

void keep(Launch launch) {
  std::lock_guard lock(state().mutex);
  state().launches.push_back(std::move(launch));
}

std::vector<Launch> take() {
  std::lock_guard lock(state().mutex);
  return std::exchange(state().launches, {});
}

}  // namespace sim_host
