#include "sim/host/launches.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace sim_host {

namespace {

// Never destroyed: `compile` is Python's, which ends first.
struct State {
  std::mutex mutex;
  Settings settings;
  std::map<std::pair<std::string, std::string>, sim_library*> libraries;
  std::vector<Launch> launches;
};

State& state() {
  static auto* only = new State();
  return *only;
}

}  // namespace

void configure(Settings settings) {
  std::lock_guard lock(state().mutex);
  state().settings = std::move(settings);
}

uint32_t workers() {
  std::lock_guard lock(state().mutex);
  return state().settings.workers;
}

sim_library* library(
    const std::string& name,
    const std::function<std::string()>& builder) {
  Settings settings;
  {
    std::lock_guard lock(state().mutex);
    settings = state().settings;
    const auto found = state().libraries.find({settings.variant, name});
    if (found != state().libraries.end()) {
      return found->second;
    }
  }
  if (!settings.compile) {
    throw std::runtime_error("[metal-sim] no shader compiler is set");
  }
  // Unlocked: it needs Python's lock.
  const std::string path = settings.compile(name, builder());
  char error[4096] = "";
  sim_library* opened = executor().open(path.c_str(), error, sizeof(error));
  if (opened == nullptr) {
    throw std::runtime_error("[metal-sim] " + name + ": " + error);
  }
  std::lock_guard lock(state().mutex);
  return state()
      .libraries.try_emplace({settings.variant, name}, opened)
      .first->second;
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
