// One use of a bank in a graph, from the node that resolves its experts to the
// kernel that reads their slots; and what came of it.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arrivals.h"
#include "slots/bank.h"

namespace glm_fused::slots {

// Whether all that was computed into a cache, or by one forward without one,
// could be. After an error MLX keeps what was being evaluated as if it were
// valid, so that whoever catches the error could go on with it: this remembers.
class Reads {
 public:
  // Of a copy of what `origin` is of.
  explicit Reads(std::shared_ptr<const Reads> origin = nullptr)
      : origin_(std::move(origin)) {}

  void fail(const char* error) noexcept;
  // Of the first failure, or empty.
  std::string error() const;
  bool failed() const noexcept;

 private:
  const std::shared_ptr<const Reads> origin_;
  mutable std::mutex mutex_;
  std::string error_;
};

// All but `error` run on the stream of the graph, one after the other.
class Use : public Arrivals {
 public:
  Use(std::shared_ptr<Bank> bank, std::shared_ptr<Reads> reads)
      : bank_(std::move(bank)), reads_(std::move(reads)) {}

  // Starts to read, if there are slots to read into; `begin` does otherwise.
  // What fails, the reads remember, and `wait` throws.
  void resolve(
      const int32_t* experts,
      int tokens,
      int top_k,
      int32_t* slots) noexcept;

  bool begin(int32_t* slots, size_t count) override;
  std::vector<int> take(std::vector<int>& pending) override;
  void end() override;
  void failed(const std::exception& error) noexcept override;

  // In place of `take`; all but the last wait in a graph that failed give slots
  // that a kernel can take.
  void wait(int32_t* slots, size_t count);

  std::string error() const {
    return reads_->error();
  }

 private:
  const std::shared_ptr<Bank> bank_;
  const std::shared_ptr<Reads> reads_;
  std::vector<int32_t> experts_;  // none: not resolved
  int tokens_ = 0, top_k_ = 0;
  bool counted_ = false, unresolved_ = false;
  std::shared_ptr<Lease> lease_;
};

}  // namespace glm_fused::slots
