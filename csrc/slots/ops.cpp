#include "slots/ops.h"

#include <atomic>

#include "checks.h"
#include "huge_pages.h"
#include "slots/nodes.h"

namespace glm_fused::slots {

namespace {

// Reads past the page cache need memory that is aligned so; it is a Mac's page.
constexpr size_t kAlign = 16384;

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
