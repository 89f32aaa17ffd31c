// A whole decode step of a model as one graph node, which was recorded once.
#pragma once

#include <memory>
#include <optional>

#include "mlx/mlx.h"
#include "ops.h"

namespace glm_fused {

using Arrays = std::vector<mx::array>;

// The ops of a step, ready to run: their kernels hold the weights, and memory
// of the step's own for what they hand on. Those that append to caches or read
// them are made anew where the caches have moved or become much longer.
class DecodeStep {
 public:
  // Takes how `outputs` and `appended` were made of `inputs` and `caches` by
  // ops of this package on a CPU stream: `inputs` begin with one [b, l, …],
  // `outputs` with the logits, which no other op takes, and `appended` are what
  // append_rows or append_packed made of `caches`, of l rows each. All other
  // arrays that were used are the weights; they have to be
  // evaluated. Throws std::runtime_error where there are other ops.
  DecodeStep(
      const Arrays& inputs,
      const Arrays& caches,
      const Arrays& outputs,
      const Arrays& appended,
      mx::StreamOrDevice s);

  // Whether the arrays are none that a transformation of a function traces.
  static bool takes(const Arrays& arrays);

  // Returns how long all steps of this process have run their kernels.
  static double run_seconds();

  // Returns the outputs of inputs of the same shapes and types, and makes of
  // each of `caches` what it is with the new rows, which begin at `at`. Throws
  // std::invalid_argument for inputs or caches that do not fit; evaluation
  // throws what `late` does. Caches are written where they lie, whose memory
  // must be there: those that have none yet are evaluated.
  Arrays operator()(
      const Arrays& inputs,
      const std::vector<mx::array*>& caches,
      int at,
      const std::optional<LateCheck>& late) const;

  // What the node runs; it outlives this.
  struct Plan;

 private:
  void check(const Arrays& inputs, const std::vector<mx::array*>& caches) const;

  std::shared_ptr<Plan> plan_;
};

}  // namespace glm_fused
