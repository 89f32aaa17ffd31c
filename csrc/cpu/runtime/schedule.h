// Runs the tasks of many kernels, those that do not need one another side by
// side.
#pragma once

#include <span>
#include <vector>

#include "cpu/runtime/dispatch.h"

namespace glm_fused::cpu {

class Schedule {
 public:
  // So many units, which are numbered one after the other, are never under way
  // together; each then has scratch memory of its own.
  static constexpr int kSlots = 64;

  // needs[i] names the units, all below i, that have to be done before unit i.
  explicit Schedule(const std::vector<std::vector<int>>& needs);

  // Runs units[i], for each unit i, its tasks one after the other. Units that
  // are ready go through their stages together: a stage's tiles are shared out
  // with those of the others. It allocates nothing, and one thread at a time
  // may be in it.
  void run(std::span<const Tasks* const> units) noexcept;

 private:
  // A unit under way: its task at hand, as a kernel in stages if it is one, and
  // that task's next stage.
  struct Running {
    int unit;
    size_t task;
    Staged* staged;
    int stage, stages;
  };
  // What a unit does next: tiles of a stage, or tasks that have none.
  struct Part {
    const Tasks* tasks;
    size_t first, end;
    int stage;  // of task `first`, or -1
    int tiles;

    void tile(int number, int worker) const noexcept;
  };

  // A tile of the parts at hand.
  struct Tile {
    const Schedule& schedule;
    void operator()(int number, int worker) const noexcept;
  };

  static Running running(int unit) {
    return {unit, 0, nullptr, 0, 0};
  }
  bool next_part(Running& running, const Tasks& tasks);
  void add_part(const Part& part);
  void gather(std::span<const Tasks* const> units);
  void release(int unit);

  std::vector<int> needed_;                   // how many, by unit
  std::vector<std::vector<int>> successors_;  // by unit
  std::vector<int> waits_;
  std::vector<Running> running_;
  std::vector<Part> parts_;  // as many as there may be, the first ones in use
  size_t part_count_ = 0;
  int tiles_ = 0, workers_ = 0;
  double work_ = 0;
};

}  // namespace glm_fused::cpu
