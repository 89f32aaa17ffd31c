// A use of a bank in a graph lasts from the node that resolves its experts to
// the kernel that reads their slots; `Reads` remembers what came of it.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "arrivals.h"
#include "slots/bank.h"

namespace glm_fused::slots {

// This remembers whether every read succeeded for what was computed into a
// cache, or by one forward without a cache. After an error MLX keeps what was
// being evaluated as if it were valid, and whoever catches the error could go
// on with it.
class Reads {
 public:
  // A copy of a cache remembers what happened to the `origin`, too.
  explicit Reads(std::shared_ptr<const Reads> origin = nullptr)
      : origin_(std::move(origin)) {}

  void fail(const char* error) noexcept;
  // Returns the first failure's text, or an empty one.
  std::string error() const;
  bool failed() const noexcept;

 private:
  const std::shared_ptr<const Reads> origin_;
  mutable std::mutex mutex_;
  std::string error_;
};

// All functions but `error` run one after the other: on the stream of the
// graph, or, of `fill`, on the thread that evaluates it.
class Use : public Arrivals {
 public:
  Use(std::shared_ptr<Bank> bank, std::shared_ptr<Reads> reads)
      : bank_(std::move(bank)), reads_(std::move(reads)) {}

  // Starts to read if there are slots to read into; otherwise `begin` does. The
  // reads remember what fails, and `wait` throws it.
  void resolve(
      const int32_t* experts,
      int tokens,
      int top_k,
      int32_t* slots) noexcept;

  void fill(
      const int32_t* experts,
      int tokens,
      int top_k,
      int32_t* slots) noexcept override;
  bool begin(int32_t* slots, size_t count) override;
  std::vector<int> take(std::vector<int>& pending) override;
  void end() override;
  void failed(const std::exception& error) noexcept override;

  // Is called in place of `take`. In a graph that failed all waits but the last
  // give slots that a kernel can take.
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
