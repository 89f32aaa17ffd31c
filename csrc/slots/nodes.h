// The graph nodes around the use of slots, as ops.h describes them. Only
// ops.cpp includes this.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/runtime/dispatch.h"
#include "mlx/mlx.h"
#include "slots/bank.h"
#include "slots/use.h"

namespace glm_fused::slots {

namespace {

namespace mx = mlx::core;

using Arrays = std::vector<mx::array>;

// These nodes share the buffer of their first input.
class SlotPrimitive : public mx::Primitive {
 public:
  using mx::Primitive::Primitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    cpu::evaluate(*this, [&] { run(inputs, outputs); });
  }
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(
        "[" + std::string(name()) + "] runs on a CPU stream.");
  }

 private:
  virtual void run(const Arrays& inputs, Arrays& outputs) = 0;
};

class Resolve : public SlotPrimitive {
 public:
  Resolve(mx::Stream stream, std::shared_ptr<Use> use)
      : SlotPrimitive(stream), use_(std::move(use)) {}

  const char* name() const override {
    return "SlotsResolve";
  }

 private:
  void run(const Arrays& inputs, Arrays& outputs) override {
    auto& out = outputs[0];
    outputs[1].set_data(mx::allocator::malloc(outputs[1].nbytes()));
    // The use ends with the slots, whatever becomes of the graph.
    out.set_data(
        mx::array::Data(
            mx::allocator::allocator().malloc(out.nbytes()),
            [use = use_](mx::allocator::Buffer buffer) {
              use->end();
              mx::allocator::allocator().free(buffer);
            }));
    cpu::enqueue(
        stream(),
        [use = use_,
         experts = cpu::holding(inputs[0]),
         slots = cpu::holding(out)]() mutable noexcept {
          use->resolve(
              experts.data<int32_t>(),
              experts.shape(0),
              experts.shape(1),
              slots.data<int32_t>());
        });
  }

  std::shared_ptr<Use> use_;
};

class Wait : public SlotPrimitive {
 public:
  Wait(mx::Stream stream, std::shared_ptr<Use> use)
      : SlotPrimitive(stream), use_(std::move(use)) {}

  const char* name() const override {
    return "SlotsWait";
  }

 private:
  void run(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
    // Not in a task: what a GPU is given next would wait for a disk, and is
    // ended by macOS where that takes seconds.
    cpu::finish(stream());
    use_->wait(outputs[0].data<int32_t>(), outputs[0].size());
  }

  std::shared_ptr<Use> use_;
};

// The inputs are y, slots, unless y's node holds them, and what to come after.
// MLX keeps the slots' buffer, and with it the lease, until all that was
// enqueued before this node has run.
class Hold : public SlotPrimitive {
 public:
  using SlotPrimitive::SlotPrimitive;

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
  }
  const char* name() const override {
    return "SlotsHold";
  }

 private:
  void run(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
  }
};

// This node lives as long as the graph that it ends and that nobody has
// evaluated, and keeps `result` alive as long.
class Release : public Hold {
 public:
  Release(mx::Stream stream, std::shared_ptr<const mx::array> result)
      : Hold(stream), result_(std::move(result)) {}

  const char* name() const override {
    return "SlotsRelease";
  }

 private:
  std::shared_ptr<const mx::array> result_;
};

// Raises on the thread that evaluates, once all before it has run: no task may
// (cpu/runtime/dispatch.h), and it might be in another generation.
class Verify : public SlotPrimitive {
 public:
  // `waits` where reads may go on in tasks of CPU streams. On a GPU's way they
  // have ended before this node is reached.
  Verify(mx::Stream stream, std::shared_ptr<const Reads> reads, bool waits)
      : SlotPrimitive(stream), reads_(std::move(reads)), waits_(waits) {}

  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    run(inputs, outputs);
  }
  const char* name() const override {
    return "SlotsVerify";
  }

 private:
  void run(const Arrays& inputs, Arrays& outputs) override {
    if (waits_) {
      mx::synchronize(stream());
    }
    if (const std::string error = reads_->error(); !error.empty()) {
      throw std::runtime_error(error);
    }
    outputs[0].copy_shared_buffer(inputs[0]);
  }

  std::shared_ptr<const Reads> reads_;
  bool waits_;
};

class Prefetch : public SlotPrimitive {
 public:
  Prefetch(mx::Stream stream, std::shared_ptr<Bank> bank)
      : SlotPrimitive(stream), bank_(std::move(bank)) {}

  const char* name() const override {
    return "SlotsPrefetch";
  }

 private:
  void run(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
    cpu::enqueue(
        stream(), [bank = bank_, experts = cpu::holding(inputs[1])]() noexcept {
          try {
            bank->prefetch(experts.data<int32_t>(), experts.size());
          } catch (const std::exception&) {
            // What is not read ahead, the request for it reads or fails to.
          }
        });
  }

  std::shared_ptr<Bank> bank_;
};

}  // namespace

}  // namespace glm_fused::slots
