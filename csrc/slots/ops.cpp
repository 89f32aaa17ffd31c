#include "slots/ops.h"

#include <algorithm>

#include "checks.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace glm_fused::slots {

namespace {

// Of memory that reads past the page cache go to; also a Mac's page.
constexpr size_t kAlign = 16384;

using Arrays = std::vector<mx::array>;

mx::array allocate(const PartType& part, int slots) {
  mx::Shape shape{slots};
  shape.insert(shape.end(), part.shape.begin(), part.shape.end());
  constexpr int64_t kMostBytes = 1ll << 46;
  int64_t bytes = part.dtype.size();
  for (const int64_t size : shape) {
    if (size < 1 || bytes > kMostBytes / size) {
      invalid(
          "slots", "a part of shape ", part.shape, " cannot be given memory.");
    }
    bytes *= size;
  }
  mx::array a(shape, part.dtype, nullptr, {});
  auto data = mx::allocator::malloc(a.nbytes() + kAlign);
  const auto address = reinterpret_cast<uintptr_t>(data.buffer().raw_ptr());
  const auto offset = static_cast<int64_t>(-address % kAlign);
  a.set_data(
      std::move(data), a.size(), a.strides(), {true, true, false}, offset);
  a.set_status(mx::array::Status::available);
  return a;
}

// A node that shares the buffer of its first input.
class SlotPrimitive : public mx::Primitive {
 public:
  SlotPrimitive(mx::Stream stream, std::shared_ptr<SlotBank> bank)
      : mx::Primitive(stream), bank_(std::move(bank)) {}

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(
        "[" + std::string(name()) + "] runs on a CPU stream.");
  }

 protected:
  std::shared_ptr<SlotBank> bank_;
};

class Resolve : public SlotPrimitive {
 public:
  using SlotPrimitive::SlotPrimitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& out = outputs[0];
    outputs[1].set_data(mx::allocator::malloc(outputs[1].nbytes()));
    auto lease = std::make_shared<std::shared_ptr<Lease>>();
    out.set_data(
        mx::array::Data(
            mx::allocator::allocator().malloc(out.nbytes()),
            [lease](mx::allocator::Buffer buffer) {
              mx::allocator::allocator().free(buffer);
            }));
    mx::cpu::get_command_encoder(stream()).dispatch(
        [bank = bank_,
         lease,
         experts = mx::array::unsafe_weak_copy(inputs[0]),
         slots = mx::array::unsafe_weak_copy(out)]() mutable {
          // Until it succeeds; `wait` and moe_decode look.
          std::fill_n(slots.data<int32_t>(), slots.size(), -1);
          *lease = bank->bank().acquire(
              experts.data<int32_t>(),
              experts.shape(0),
              experts.shape(1),
              slots.data<int32_t>());
        });
  }
  const char* name() const override {
    return "SlotsResolve";
  }
};

class Wait : public SlotPrimitive {
 public:
  using SlotPrimitive::SlotPrimitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [bank = bank_,
         slots = mx::array::unsafe_weak_copy(inputs[0])]() mutable {
          // After an error MLX goes on with what was enqueued: no kernel must
          // get an index that it cannot take.
          int32_t* s = slots.data<int32_t>();
          if (std::count(s, s + slots.size(), -1) > 0) {
            std::fill_n(s, slots.size(), 0);
            throw std::runtime_error("[slots] the experts were not resolved.");
          }
          bank->bank().wait(s, slots.size());
        });
  }
  const char* name() const override {
    return "SlotsWait";
  }
};

// inputs: y, slots, what to come after. MLX keeps the slots' buffer, and with
// it the lease, until all that was enqueued before this node has run.
class Hold : public SlotPrimitive {
 public:
  using SlotPrimitive::SlotPrimitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
  }
  const char* name() const override {
    return "SlotsHold";
  }
};

// Lives as long as the graph that it ends and that nobody has evaluated; while
// it does, so does `use`.
class Release : public Hold {
 public:
  Release(
      mx::Stream stream,
      std::shared_ptr<SlotBank> bank,
      std::shared_ptr<const mx::array> use)
      : Hold(stream, std::move(bank)), use_(std::move(use)) {}

  const char* name() const override {
    return "SlotsRelease";
  }

 private:
  std::shared_ptr<const mx::array> use_;
};

class Prefetch : public SlotPrimitive {
 public:
  using SlotPrimitive::SlotPrimitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    outputs[0].copy_shared_buffer(inputs[0]);
    mx::cpu::get_command_encoder(stream()).dispatch(
        [bank = bank_, experts = mx::array::unsafe_weak_copy(inputs[1])] {
          bank->bank().prefetch(experts.data<int32_t>(), experts.size());
        });
  }
  const char* name() const override {
    return "SlotsPrefetch";
  }
};

mx::Stream cpu_stream() {
  return mx::to_stream(mx::Device(mx::Device::cpu));
}

mx::array rows_of(const std::string& op, const mx::array& experts) {
  if (experts.ndim() != 2 || experts.dtype() != mx::int32) {
    invalid(
        op,
        "experts must be int32 [tokens, top_k] but is ",
        experts.dtype(),
        " ",
        shape_of(experts),
        ".");
  }
  return mx::contiguous(experts, false, cpu_stream());
}

void check_slots(const std::string& op, const mx::array& slots) {
  if (slots.ndim() != 2 || slots.dtype() != mx::int32) {
    invalid(
        op,
        "slots must be those that resolve returned but is ",
        slots.dtype(),
        " ",
        shape_of(slots),
        ".");
  }
}

}  // namespace

SlotBank::SlotBank(
    std::shared_ptr<Reader> reader,
    BankOptions options,
    const std::vector<PartType>& parts,
    int slots,
    int spares,
    const std::string& policy,
    const std::vector<int>& pinned) {
  const size_t count = options.locations.size();
  if (parts.empty() || count == 0 || count % parts.size() != 0) {
    invalid("slots", count, " locations are not one for each expert's part.");
  }
  const int experts = static_cast<int>(count / parts.size());
  if (spares < 0) {
    invalid("slots", "spares must not be negative but is ", spares, ".");
  }
  if (slots < 1 || slots > experts) {
    invalid(
        "slots",
        "a layer of ",
        experts,
        " experts takes 1 to ",
        experts,
        " slots but is given ",
        slots,
        ".");
  }
  for (const PartType& part : parts) {
    arrays_.push_back(allocate(part, slots));
    const auto bytes = static_cast<int64_t>(arrays_.back().nbytes() / slots);
    options.parts.push_back({bytes, arrays_.back().data<std::byte>()});
  }
  for (size_t i = 0; i < count; i++) {
    const auto [file, offset] = options.locations[i];
    const int64_t bytes = options.parts[i % parts.size()].bytes;
    if (file < 0 || file >= options.files->count() || offset < 0 ||
        offset > options.files->size(file) - bytes) {
      invalid(
          "slots",
          "layer ",
          options.layer,
          ", expert ",
          i / parts.size(),
          ": its ",
          bytes,
          " bytes at ",
          offset,
          " lie outside of file ",
          file,
          ".");
    }
  }
  options.memory = std::make_shared<const Arrays>(arrays_);
  bank_ = std::make_unique<Bank>(
      std::move(reader),
      std::move(options),
      std::make_unique<SlotTable>(
          experts,
          slots,
          spares,
          make_policy(policy, experts, slots - spares, pinned)));
}

std::pair<mx::array, mx::array> resolve(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& experts) {
  Arrays inputs{rows_of("slots.resolve", experts)};
  {
    std::lock_guard lock(bank->mutex_);
    if (const auto use = bank->last_use_.lock()) {
      inputs.push_back(*use);
    }
  }
  auto outputs = mx::array::make_arrays(
      {experts.shape(), {1}},
      {mx::int32, mx::int32},
      std::make_shared<Resolve>(cpu_stream(), bank),
      inputs);
  return {outputs[0], outputs[1]};
}

mx::array wait(const std::shared_ptr<SlotBank>& bank, const mx::array& slots) {
  check_slots("slots.wait", slots);
  return mx::array(
      slots.shape(),
      mx::int32,
      std::make_shared<Wait>(cpu_stream(), bank),
      Arrays{slots});
}

std::shared_ptr<Arrivals> arrivals(const std::shared_ptr<SlotBank>& bank) {
  return {bank, &bank->bank()};
}

mx::array release(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& y,
    const mx::array& slots) {
  check_slots("slots.release", slots);
  const auto stream = y.has_primitive() ? y.primitive().stream() : cpu_stream();
  // The next request waits for this node, not for y: behind it in the stream
  // the lease has ended.
  std::lock_guard lock(bank->mutex_);
  Arrays inputs{y, slots};
  if (const auto use = bank->last_use_.lock()) {
    inputs.push_back(*use);
  }
  const auto held = std::make_shared<const mx::array>(
      y.shape(),
      y.dtype(),
      std::make_shared<Hold>(stream, bank),
      std::move(inputs));
  bank->last_use_ = held;
  return mx::array(
      y.shape(),
      y.dtype(),
      std::make_shared<Release>(stream, bank, held),
      Arrays{*held});
}

mx::array prefetch(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& experts,
    const mx::array& x) {
  return mx::array(
      x.shape(),
      x.dtype(),
      std::make_shared<Prefetch>(cpu_stream(), bank),
      {x, rows_of("slots.prefetch", experts)});
}

}  // namespace glm_fused::slots
