// The calls of a recorded decode step that take cached rows.
#pragma once

#include <memory>
#include <vector>

#include "ops/step_plan.h"

namespace glm_fused {

// They are ready to run on caches that lie at certain places in memory, which
// they do not keep: who runs them does. A step then says how many rows there
// are, and nothing else has to be made anew for it.
class CacheCalls {
 public:
  // Takes caches [b, 1, capacity, width] with the memory that appending gave
  // them, and how many rows they will have; more will do as well, up to some
  // hundred. `plan` has to outlive this.
  CacheCalls(const StepPlan& plan, const Arrays& caches, int rows);
  CacheCalls(const CacheCalls&) = delete;
  CacheCalls& operator=(const CacheCalls&) = delete;

  // Whether it can run on these caches, with so many rows.
  bool fit(const Arrays& caches, int rows) const;

  // Begins a step after which the caches have `rows` rows. `logits` is its last
  // call, where that makes what is given away. One step at a time may be under
  // way.
  void begin(int rows, const cpu::Tasks& logits) noexcept;

  // Runs a segment of it, in their order.
  void run(StepPlan::Segment& segment) noexcept;

 private:
  // The rows of a cache that are written.
  struct Target {
    int cache;
    mx::array rows;
  };

  void add(int number, std::vector<Arrays>& rows);
  const mx::array& value(const Value& v, const std::vector<Arrays>& rows) const;
  Arrays targets_of(int number);

  const StepPlan& plan_;
  Arrays caches_;   // without their memory
  const int most_;  // rows for which there is scratch memory
  int filled_ = 0;  // rows in the run at hand
  std::vector<Target> targets_;
  std::vector<cpu::Tasks> tasks_;  // of these calls, by their numbers
  std::vector<const cpu::Tasks*> units_;
};

}  // namespace glm_fused
