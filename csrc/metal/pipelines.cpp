#include "metal/pipelines.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>

#include "metal/kernel_list.h"

namespace glm_fused::metal {

namespace {

struct Hash {
  size_t operator()(const KernelName& name) const {
    return name.hash();
  }
};

thread_local Rehearsal* rehearsal = nullptr;

std::atomic<int64_t> launches{0};

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The kernels that have been compiled, on any device.
class List {
 public:
  void add(
      const KernelName& name,
      MTL::ComputePipelineState* kernel,
      double seconds) {
    std::lock_guard lock(mutex_);
    kernels_.push_back(
        {name.function(),
         static_cast<int>(kernel->maxTotalThreadsPerThreadgroup()),
         static_cast<int>(kernel->staticThreadgroupMemoryLength()),
         seconds});
  }
  std::vector<ListedKernel> kernels() {
    std::lock_guard lock(mutex_);
    return kernels_;
  }

 private:
  std::mutex mutex_;
  std::vector<ListedKernel> kernels_;
};

// This is never destroyed, as MLX's threads may outlive the module.
List& list() {
  static List& list = *new List;
  return list;
}

}  // namespace

std::vector<ListedKernel> listed_kernels() {
  return list().kernels();
}

int64_t take_launches() {
  return launches.exchange(0);
}

struct Known {
  explicit Known(const mx::metal::Device& device)
      : tiles(tiles_for(device.get_architecture())) {}

  MTL::ComputePipelineState* find(const KernelName& name) {
    std::shared_lock lock(mutex);
    const auto found = kernels.find(name);
    return found == kernels.end() ? nullptr : found->second;
  }

  void keep(const KernelName& name, MTL::ComputePipelineState* kernel) {
    std::lock_guard lock(mutex);
    kernels.emplace(name, kernel);
  }

  const Tiles tiles;
  std::shared_mutex mutex;
  std::unordered_map<KernelName, MTL::ComputePipelineState*, Hash> kernels;
};

namespace {

// Devices live for ever, and so does what is known of them.
Known& known(mx::metal::Device& device) {
  static auto& mutex = *new std::shared_mutex();
  static auto& all =
      *new std::unordered_map<mx::metal::Device*, std::unique_ptr<Known>>();
  {
    std::shared_lock lock(mutex);
    if (const auto found = all.find(&device); found != all.end()) {
      return *found->second;
    }
  }
  auto made = std::make_unique<Known>(device);
  std::lock_guard lock(mutex);
  return *all.try_emplace(&device, std::move(made)).first->second;
}

}  // namespace

Rehearsal::Rehearsal() {
  rehearsal = this;
}

Rehearsal::~Rehearsal() {
  rehearsal = nullptr;
}

Encoder::Encoder(const mx::Stream& stream)
    : device_(mx::metal::device(stream.device)),
      known_(known(device_)),
      encoder_(rehearsal ? nullptr : &mx::metal::get_command_encoder(stream)) {}

const Tiles& Encoder::tiles() const {
  return known_.tiles;
}

MTL::ComputePipelineState* Encoder::kernel(const KernelName& name) {
  if (auto* found = known_.find(name)) {
    return found;
  }
  if (rehearsal) {
    auto& missing = rehearsal->missing;
    if (std::ranges::find(missing, name) == missing.end()) {
      missing.push_back(name);
    }
    return nullptr;
  }
  const auto start = Clock::now();
  auto library = device_.get_library(
      name.library(), [&] { return name.source() + name.instance(); });
  auto* made = device_.get_kernel(name.host(), library);
  known_.keep(name, made);
  list().add(name, made, seconds_since(start));
  return made;
}

void Encoder::set_compute_pipeline_state(MTL::ComputePipelineState* kernel) {
  if (encoder_) {
    encoder_->set_compute_pipeline_state(kernel);
  }
}

void Encoder::set_input_array(const mx::array& a, int index) {
  if (encoder_) {
    encoder_->set_input_array(a, index);
  }
}

void Encoder::set_output_array(mx::array& a, int index) {
  if (encoder_) {
    encoder_->set_output_array(a, index);
  }
}

void Encoder::set_threadgroup_memory_length(size_t bytes, int index) {
  if (encoder_) {
    encoder_->set_threadgroup_memory_length(bytes, index);
  }
}

void Encoder::add_temporary(const mx::array& a) {
  if (encoder_) {
    encoder_->add_temporary(a);
  }
}

void Encoder::add_temporaries(std::vector<mx::array> arrays) {
  if (encoder_) {
    encoder_->add_temporaries(std::move(arrays));
  }
}

void Encoder::begin(std::function<void()> done) {
  if (encoder_) {
    encoder_->end_encoding();
    encoder_->commit(std::move(done));
  }
}

void Encoder::dispatch_threadgroups(MTL::Size groups, MTL::Size group) {
  if (encoder_) {
    launches++;
    encoder_->dispatch_threadgroups(groups, group);
  }
}

void Encoder::dispatch_threads(MTL::Size threads, MTL::Size group) {
  if (encoder_) {
    launches++;
    encoder_->dispatch_threads(threads, group);
  }
}

void compile(
    const std::vector<KernelName>& missing,
    const std::function<void(int)>& done) {
  auto& device = mx::metal::device(mx::Device::gpu);
  std::map<const char*, std::vector<KernelName>> shaders;
  for (const KernelName& name : missing) {
    shaders[name.source()].push_back(name);
  }
  int count = 0;
  for (const auto& [source, names] : shaders) {
    std::string text = source;
    for (const KernelName& name : names) {
      text += name.instance();
    }
    const std::string library_name =
        "glm_fused_" + std::to_string(std::hash<std::string>()(text));
    auto start = Clock::now();  // the first of a library counts for it, too
    auto library = device.get_library(library_name, [&] { return text; });
    for (const KernelName& name : names) {
      auto* made = device.get_kernel(name.host(), library);
      known(device).keep(name, made);
      list().add(name, made, seconds_since(start));
      done(++count);
      start = Clock::now();
    }
  }
}

int simdgroups(MTL::ComputePipelineState* kernel, int wanted) {
  if (kernel == nullptr) {
    return wanted;  // a rehearsal's
  }
  const int most = static_cast<int>(kernel->maxTotalThreadsPerThreadgroup());
  return std::clamp(most / 32, 1, wanted);
}

// Metal takes threadgroup memory in steps of 16 bytes.
size_t threadgroup_bytes(size_t words) {
  return (4 * words + 15) / 16 * 16;
}

mx::array allocate(mx::Shape shape, mx::Dtype dtype) {
  mx::array a(std::move(shape), dtype, nullptr, {});
  allocate(a);
  return a;
}

void allocate(mx::array& a) {
  a.set_data(mx::allocator::malloc(rehearsal ? 1 : a.nbytes()));
}

void bind_weight(
    Encoder& encoder,
    const mx::array* planes,
    const Format& format,
    int index) {
  for (int p = 0; p < kMaxPlanes; p++) {
    const bool present = p < format.spec->plane_count;
    encoder.set_input_array(planes[present ? p : 0], index + p);
  }
}

}  // namespace glm_fused::metal
