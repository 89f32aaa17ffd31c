// A slot bank as MLX arrays, and the graph nodes around its use:
//
//   pending, started = resolve(bank, experts);
//   shared = …;  // of an x that depends on `started`
//   y = moe_decode(x, bank.arrays…, pending, scores, arrivals(bank));
//   y = release(bank, y, pending);
//
// `resolve` is evaluated when its turn comes: it leases slots, starts to read
// what is missing and returns, so that the shared expert computes meanwhile,
// and then each expert that is read. A GPU cannot wait for the disk half way:
// there moe_decode has no `arrivals` but the slots of wait(bank, pending).
// All run on a CPU stream, `release` on that of `y`.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "mlx/mlx.h"
#include "slots/bank.h"

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

  Bank& bank() {
    return *bank_;
  }
  // [slots, …] for each part; the bank writes into them.
  const std::vector<mx::array>& arrays() const {
    return arrays_;
  }

 private:
  friend std::pair<mx::array, mx::array> resolve(
      const std::shared_ptr<SlotBank>& bank,
      const mx::array& experts);
  friend mx::array release(
      const std::shared_ptr<SlotBank>& bank,
      const mx::array& y,
      const mx::array& slots);

  std::vector<mx::array> arrays_;
  std::unique_ptr<Bank> bank_;
  std::mutex mutex_;  // of `last_use_`
  // The result that the last request's slots are for, while no evaluation has
  // reached it: the next request waits for it in the graph, as it did for the
  // one before, or a bank that both need whole would be leased to neither.
  // Weak, so that a graph that nobody evaluates is not kept, nor evaluated for
  // the sake of its order.
  std::weak_ptr<const mx::array> last_use_;
};

// int32 [tokens, top_k], the slots of `experts`, whose reads may go on; and
// int32 [1], computed with them, for what has to come later: an input of a node
// that is not evaluated lives, and the slots themselves would be held.
std::pair<mx::array, mx::array> resolve(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& experts);

// The same slots, read.
mx::array wait(const std::shared_ptr<SlotBank>& bank, const mx::array& slots);

// For moe_decode, of the bank's slots.
std::shared_ptr<Arrivals> arrivals(const std::shared_ptr<SlotBank>& bank);

// `y`, computed with `slots`, which are held until then.
mx::array release(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& y,
    const mx::array& slots);

// `x`; starts to read `experts` into spare slots.
mx::array prefetch(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& experts,
    const mx::array& x);

}  // namespace glm_fused::slots
