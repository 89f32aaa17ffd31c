// Collects what a launch found; several workers may add to it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "executor.h"

namespace sim {

struct Place {
  uintptr_t pc = 0;            // a memory access has this,
  const char* file = nullptr;  // a synchronising call file and line
  uint32_t line = 0;
};

struct Finding {
  sim_finding_kind kind;
  int32_t buffer;
  int64_t offset;
  uint32_t threadgroup, thread, other_threadgroup, other_thread;
  Place place, other_place;
  std::string text;  // completed with file and line when the report is closed
};

}  // namespace sim

struct sim_report {
  void add(const sim::Finding& finding);
  void fail(const std::string& message);  // the first failure is kept
  bool failed();
  // Resolves places to lines of `library` and freezes the findings.
  void close(const char* kernel, const std::string& library);

  std::string error;
  std::vector<sim_finding> findings;
  std::vector<sim_traffic> traffic;
  sim_counts counts{};

 private:
  using Key = std::tuple<int, int, uintptr_t, uint32_t, uintptr_t, uint32_t>;
  struct Entry {
    sim::Finding first;
    uint64_t count;
  };
  std::mutex mutex_;
  std::map<Key, size_t> index_;
  std::vector<Entry> entries_;
  std::vector<std::unique_ptr<std::string>> strings_;

  const char* keep(std::string text);
};
