// A slot bank has MLX arrays for its slots and graph nodes around their use:
//
//   use = SlotUse(bank, reads);
//   pending, started = resolve(use, experts);
//   shared = …;  // of an x that depends on `started`
//   y = moe_decode(x, bank.arrays…, pending, scores, use);
//   y = release(use, y, pending);
//   y = verify(reads, y);  // at the end of a forward
//
// `resolve` is evaluated when its turn comes: it leases slots, starts to read
// what is missing and returns. The shared expert computes meanwhile, and then
// each expert once it is read. A GPU cannot wait for the disk half way: there
// moe_decode takes no `use`, but the slots of wait(use, pending), a node whose
// evaluation begins what the GPU has to do and returns when they are read. All
// nodes run on a CPU stream, `release` and `verify` on that of `y`.
//
// On Metal a decode step does it in one node (ops/metal_blocks.h), which takes
// `last` as an input, and to which `release` is given y alone.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mlx/mlx.h"
#include "slots/bank.h"
#include "slots/use.h"

namespace glm_fused::slots {

namespace mx = mlx::core;

// This is the shape and type of one tensor of an expert.
struct PartType {
  mx::Shape shape;
  mx::Dtype dtype;
};

class SlotBank {
 public:
  // The parts of `options` are empty: they are allocated here.
  SlotBank(
      std::shared_ptr<Reader> reader,
      BankOptions options,
      const std::vector<PartType>& parts,
      int slots,
      int spares,
      const std::string& policy,
      const std::vector<int>& pinned);

  const std::shared_ptr<Bank>& bank() const {
    return bank_;
  }
  // Returns an array [slots, …] for each part; the bank writes into them.
  const std::vector<mx::array>& arrays() const {
    return arrays_;
  }

 private:
  friend class SlotUse;

  // `result` is what the last request's slots are for, while no evaluation has
  // reached it. The next request of the same thread waits for it in the graph,
  // so that a bank that both need whole is not read into twice. It is weak: a
  // graph that nobody evaluates is neither kept nor evaluated for the sake of
  // its order. The result of another thread is never an input, because MLX
  // evaluates a node in the thread that made it.
  struct Last {
    std::weak_ptr<const mx::array> result;
    std::weak_ptr<const Use> use;
  };

  std::vector<mx::array> arrays_;
  std::shared_ptr<Bank> bank_;
  std::mutex mutex_;               // of `last_`
  std::map<uint64_t, Last> last_;  // by thread
};

// This is one use of a bank in the graph that this thread builds.
class SlotUse {
 public:
  SlotUse(std::shared_ptr<SlotBank> bank, std::shared_ptr<Reads> reads);

  const std::shared_ptr<Use>& use() const {
    return use_;
  }

  // Returns the slots of `experts`, int32 [tokens, top_k], whose reads may go
  // on, and int32 [1], which is computed with them and on which later nodes can
  // depend: an input of a node that is not evaluated lives on, and the slots
  // themselves would stay leased.
  std::pair<mx::array, mx::array> resolve(const mx::array& experts);

  // Returns the same slots once they are read.
  mx::array wait(const mx::array& slots) const;

  // Returns what to come after, if there is anything: the result of the last
  // use of the bank in a graph of this thread.
  std::optional<mx::array> last() const;

  // Returns `y`, which was computed with `slots`; their lease ends with it.
  // There are none where y's node has filled and held slots of its own.
  mx::array release(
      const mx::array& y,
      const std::optional<mx::array>& slots = std::nullopt);

 private:
  std::shared_ptr<const mx::array> last_result() const;

  std::shared_ptr<SlotBank> bank_;
  std::shared_ptr<Use> use_;
};

// Returns `y`. If a read failed for what it was computed from, evaluation
// raises the error, and y is NaN.
mx::array verify(const std::shared_ptr<Reads>& reads, const mx::array& y);

// Returns `x`, and starts to read `experts` into spare slots.
mx::array prefetch(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& experts,
    const mx::array& x);

}  // namespace glm_fused::slots
