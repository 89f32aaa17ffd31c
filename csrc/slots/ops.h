// A slot bank as MLX arrays, and the graph nodes around its use:
//
//   use = SlotUse(bank, reads);
//   pending, started = resolve(use, experts);
//   shared = …;  // of an x that depends on `started`
//   y = moe_decode(x, bank.arrays…, pending, scores, use);
//   y = release(use, y, pending);
//   y = verify(reads, y);  // at the end of a forward
//
// `resolve` is evaluated when its turn comes: it leases slots, starts to read
// what is missing and returns, so that the shared expert computes meanwhile,
// and then each expert that is read. A GPU cannot wait for the disk half way:
// there moe_decode has no `use` but the slots of wait(use, pending).
// All run on a CPU stream, `release` on that of `y`.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "mlx/mlx.h"
#include "slots/bank.h"
#include "slots/use.h"

namespace glm_fused::slots {

namespace mx = mlx::core;

// The shape and type of one tensor of an expert.
struct PartType {
  mx::Shape shape;
  mx::Dtype dtype;
};

class SlotBank {
 public:
  // `options` without its parts, which are allocated here.
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
  // [slots, …] for each part; the bank writes into them.
  const std::vector<mx::array>& arrays() const {
    return arrays_;
  }

 private:
  friend class SlotUse;

  // The result that the last request's slots are for, while no evaluation has
  // reached it: the next request of the same thread waits for it in the graph,
  // as it did for the one before, so that a bank that both need whole is not
  // read into twice. Weak, so that a graph that nobody evaluates is not kept,
  // nor evaluated for the sake of its order. Another thread's is never an
  // input: MLX evaluates a node in the thread that made it.
  struct Last {
    std::weak_ptr<const mx::array> result;
    std::weak_ptr<const Use> use;
  };

  std::vector<mx::array> arrays_;
  std::shared_ptr<Bank> bank_;
  std::mutex mutex_;               // of `last_`
  std::map<uint64_t, Last> last_;  // by thread
};

// A use of `bank` in the graph that this thread builds.
class SlotUse {
 public:
  SlotUse(std::shared_ptr<SlotBank> bank, std::shared_ptr<Reads> reads);

  const std::shared_ptr<Use>& use() const {
    return use_;
  }

  // int32 [tokens, top_k], the slots of `experts`, whose reads may go on; and
  // int32 [1], computed with them, for what has to come later: an input of a
  // node that is not evaluated lives, and the slots themselves would be leased.
  std::pair<mx::array, mx::array> resolve(const mx::array& experts);

  // The same slots, read.
  mx::array wait(const mx::array& slots) const;

  // `y`, computed with `slots`, which are leased until then.
  mx::array release(const mx::array& y, const mx::array& slots);

 private:
  std::shared_ptr<const mx::array> last_result() const;

  std::shared_ptr<SlotBank> bank_;
  std::shared_ptr<Use> use_;
};

// `y`, unless something failed in what it was computed from: then evaluation
// raises that, and y is NaN.
mx::array verify(const std::shared_ptr<Reads>& reads, const mx::array& y);

// `x`; starts to read `experts` into spare slots.
mx::array prefetch(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& experts,
    const mx::array& x);

}  // namespace glm_fused::slots
