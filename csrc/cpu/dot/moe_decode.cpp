#include "cpu/dot/moe_decode.h"

#include <cstring>
#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/dot/fused_moe.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "reference/reference.h"

namespace glm_fused {

namespace cpu {

namespace {

// The experts of a bank that are there.
class Resident : public FusedMoe {
 public:
  Resident(const Moe& moe, bool reference, Scratch& scratch, int workers)
      : FusedMoe(moe, false, scratch, workers), reference_(reference) {}

  void run() {
    if (reference_) {
      reference::moe_decode(moe_);
    } else {
      run_stages(workers_);
    }
  }

 private:
  const bool reference_;
};

// Those that are read meanwhile.
class Streamed {
 public:
  Streamed(
      const Moe& moe,
      bool reference,
      std::shared_ptr<Arrivals> arrivals,
      Scratch& scratch,
      int workers)
      : moe_(moe),
        reference_(reference),
        arrivals_(std::move(arrivals)),
        fused_(moe, true, scratch, workers) {}

  void run() {
    try {
      // The slots may become others than MLX's array says so far.
      mx::array slots = moe_.slots;
      if (!arrivals_->begin(slots.data<int32_t>(), slots.size())) {
        fill_with_nan();
        return;
      }
      check_slots("moe_decode", slots, moe_.gate.slots);
      compute();
      arrivals_->end();
    } catch (const std::exception& error) {
      // MLX goes on with what was enqueued, and keeps what is in y: it must
      // not pass for a result.
      fill_with_nan();
      arrivals_->failed(error);
    }
  }

 private:
  void compute() {
    if (!reference_) {
      fused_.run_as_they_come(*arrivals_);
      return;
    }
    const int32_t* slots = moe_.slots.data<int32_t>();
    std::vector<int> pending(slots, slots + moe_.slots.size());
    while (!pending.empty()) {
      arrivals_->take(pending);
    }
    reference::moe_decode(moe_);
  }

  // Fills y with NaN, which all bits set are in every type of activations.
  void fill_with_nan() const {
    std::memset(moe_.y.data<std::byte>(), 0xff, moe_.y.nbytes());
  }

  const Moe moe_;
  const bool reference_;
  const std::shared_ptr<Arrivals> arrivals_;
  FusedMoe fused_;
};

}  // namespace

}  // namespace cpu

void MoeDecode::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  if (!known_slots_) {
    cpu::evaluate(*this, [&] {
      cpu::wait_for(inputs[1], stream());
      check_slots("moe_decode", inputs[1], inputs[3].shape(0));
    });
  }
  const auto moe = [&](auto& in, auto& out) {
    size_t next = 3;
    const cpu::Matrix gate(in, next, gate_, in[0].shape(1));
    const cpu::Matrix up(in, next, up_, in[0].shape(1));
    const cpu::Matrix down(in, next, down_, gate.n);
    const FloatType type = float_type_of(out[0].dtype());
    return cpu::Moe{in[0], in[1], in[2], gate, up, down, out[0], type};
  };
  if (arrivals_) {
    const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
      return cpu::Streamed(moe(in, out), reference_, arrivals_, scratch, n);
    };
    cpu::dispatch(*this, inputs, outputs, make, reference_);
  } else {
    const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
      return cpu::Resident(moe(in, out), reference_, scratch, n);
    };
    cpu::dispatch(*this, inputs, outputs, make, reference_);
  }
}

}  // namespace glm_fused
