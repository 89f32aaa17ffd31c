#include "cpu/runtime/schedule.h"

#include <algorithm>
#include <climits>

namespace glm_fused::cpu {

Schedule::Schedule(const std::vector<std::vector<int>>& needs)
    : needed_(needs.size()), successors_(needs.size()) {
  const int units = static_cast<int>(needs.size());
  for (int i = 0; i < units; i++) {
    std::vector<int> all = needs[i];
    if (i >= kSlots) {
      all.push_back(i - kSlots);
    }
    std::ranges::sort(all);
    all.erase(std::ranges::unique(all).begin(), all.end());
    needed_[i] = static_cast<int>(all.size());
    for (int need : all) {
      successors_[need].push_back(i);
    }
  }
  waits_.reserve(units);
  running_.reserve(units);
  parts_.resize(units);
}

void Schedule::run(std::span<const Tasks* const> units) noexcept {
  waits_ = needed_;
  running_.clear();
  for (int i = 0; i < static_cast<int>(waits_.size()); i++) {
    if (waits_[i] == 0) {
      running_.push_back(running(i));
    }
  }
  const Tile tile{*this};
  parallel_chain([&](Region& region) {
    gather(units);
    region = {tiles_, tile, work_, workers_};
    return part_count_ > 0;
  });
}

// Takes the next part of every unit under way; those that are done make way
// for their successors.
void Schedule::gather(std::span<const Tasks* const> units) {
  part_count_ = 0;
  tiles_ = 0;
  work_ = 0;
  workers_ = INT_MAX;
  size_t kept = 0;
  for (size_t i = 0; i < running_.size(); i++) {  // it grows meanwhile
    Running running = running_[i];
    if (next_part(running, *units[running.unit])) {
      running_[kept++] = running;
    } else {
      release(running.unit);
    }
  }
  running_.resize(kept);
}

bool Schedule::next_part(Running& running, const Tasks& tasks) {
  for (;;) {
    if (running.stage < running.stages) {
      const int number = running.stage++;
      const Staged::Stage stage = running.staged->begin(number);
      if (stage.tiles > 0) {
        const size_t task = running.task - 1;
        work_ += stage.work;
        workers_ = std::min(workers_, tasks[task]->workers());
        add_part({&tasks, task, running.task, number, stage.tiles});
        return true;
      }
      continue;
    }
    const size_t first = running.task;
    while (running.task < tasks.size() &&
           (running.staged = tasks[running.task]->staged()) == nullptr) {
      running.task++;
    }
    if (running.task > first) {
      add_part({&tasks, first, running.task, -1, 1});
      return true;
    }
    if (running.task == tasks.size()) {
      return false;
    }
    running.task++;
    running.stage = 0;
    running.stages = running.staged->stages();
  }
}

void Schedule::add_part(const Part& part) {
  parts_[part_count_++] = part;
  tiles_ += part.tiles;
}

void Schedule::release(int unit) {
  for (int next : successors_[unit]) {
    if (--waits_[next] == 0) {
      running_.push_back(running(next));
    }
  }
}

void Schedule::Tile::operator()(int number, int worker) const noexcept {
  const Part* part = schedule.parts_.data();
  for (; number >= part->tiles; part++) {
    number -= part->tiles;
  }
  part->tile(number, worker);
}

void Schedule::Part::tile(int number, int worker) const noexcept {
  if (stage >= 0) {
    (*tasks)[first]->staged()->tile(stage, number, worker);
    return;
  }
  for (size_t i = first; i < end; i++) {
    (*tasks)[i]->run();
  }
}

}  // namespace glm_fused::cpu
