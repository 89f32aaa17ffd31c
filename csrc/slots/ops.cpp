#include "slots/ops.h"

#include <atomic>

#include "checks.h"
#include "cpu/runtime/dispatch.h"
#include "huge_pages.h"

namespace glm_fused::slots {

namespace {

// Reads past the page cache need memory that is aligned so; it is a Mac's page.
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
  ask_for_huge_pages(a.data<uint8_t>(), a.nbytes());
  return a;
}

// No other thread ever has the number; ids of std::thread are used again.
uint64_t thread_number() {
  static std::atomic<uint64_t> last{0};
  thread_local const uint64_t number = ++last;
  return number;
}

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
  bank_ = std::make_shared<Bank>(
      std::move(reader),
      std::move(options),
      std::make_unique<SlotTable>(
          experts,
          slots,
          spares,
          make_policy(policy, experts, slots - spares, pinned)));
}

SlotUse::SlotUse(std::shared_ptr<SlotBank> bank, std::shared_ptr<Reads> reads)
    : bank_(std::move(bank)),
      use_(std::make_shared<Use>(bank_->bank(), std::move(reads))) {}

// Returns what to come after. Nothing comes after a graph that failed: it may
// live on, and what is left of it would fail again.
std::shared_ptr<const mx::array> SlotUse::last_result() const {
  const auto last = bank_->last_.find(thread_number());
  if (last == bank_->last_.end()) {
    return nullptr;
  }
  const auto use = last->second.use.lock();
  return use && use->error().empty() ? last->second.result.lock() : nullptr;
}

std::pair<mx::array, mx::array> SlotUse::resolve(const mx::array& experts) {
  Arrays inputs{rows_of("slots.resolve", experts)};
  {
    std::lock_guard lock(bank_->mutex_);
    if (const auto result = last_result()) {
      inputs.push_back(*result);
    }
  }
  auto outputs = mx::array::make_arrays(
      {experts.shape(), {1}},
      {mx::int32, mx::int32},
      std::make_shared<Resolve>(cpu_stream(), use_),
      inputs);
  return {outputs[0], outputs[1]};
}

mx::array SlotUse::wait(const mx::array& slots) const {
  check_slots("slots.wait", slots);
  return mx::array(
      slots.shape(),
      mx::int32,
      std::make_shared<Wait>(cpu_stream(), use_),
      Arrays{slots});
}

std::optional<mx::array> SlotUse::last() const {
  std::lock_guard lock(bank_->mutex_);
  const auto result = last_result();
  return result ? std::optional(*result) : std::nullopt;
}

mx::array SlotUse::release(
    const mx::array& y,
    const std::optional<mx::array>& slots) {
  if (slots) {
    check_slots("slots.release", *slots);
  }
  const auto stream = y.has_primitive() ? y.primitive().stream() : cpu_stream();
  // The next request waits for this node, not for y: behind it in the stream
  // the lease has ended.
  std::lock_guard lock(bank_->mutex_);
  Arrays inputs{y};
  if (slots) {
    inputs.push_back(*slots);
  }
  if (const auto result = last_result()) {
    inputs.push_back(*result);
  }
  const auto held = std::make_shared<const mx::array>(
      y.shape(), y.dtype(), std::make_shared<Hold>(stream), std::move(inputs));
  std::erase_if(bank_->last_, [](const auto& entry) {
    return entry.second.result.expired();
  });
  bank_->last_[thread_number()] = {held, use_};
  return mx::array(
      y.shape(),
      y.dtype(),
      std::make_shared<Release>(stream, held),
      Arrays{*held});
}

mx::array verify(const std::shared_ptr<Reads>& reads, const mx::array& y) {
  const auto stream = y.has_primitive() ? y.primitive().stream() : cpu_stream();
  const bool waits = stream.device == mx::Device::cpu;
  return mx::array(
      y.shape(),
      y.dtype(),
      std::make_shared<Verify>(stream, reads, waits),
      Arrays{y});
}

mx::array prefetch(
    const std::shared_ptr<SlotBank>& bank,
    const mx::array& experts,
    const mx::array& x) {
  return mx::array(
      x.shape(),
      x.dtype(),
      std::make_shared<Prefetch>(cpu_stream(), bank->bank()),
      {x, rows_of("slots.prefetch", experts)});
}

}  // namespace glm_fused::slots
