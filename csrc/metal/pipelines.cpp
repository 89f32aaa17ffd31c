#include "metal/pipelines.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

namespace glm_fused::metal {

namespace {

struct Hash {
  size_t operator()(const KernelName& name) const {
    return name.hash();
  }
};

thread_local Rehearsal* rehearsal = nullptr;

}  // namespace

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
  auto library = device_.get_library(
      name.library(), [&] { return name.source() + name.instance(); });
  auto* made = device_.get_kernel(name.host(), library);
  known_.keep(name, made);
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

void Encoder::dispatch_threadgroups(MTL::Size groups, MTL::Size group) {
  if (encoder_) {
    encoder_->dispatch_threadgroups(groups, group);
  }
}

void Encoder::dispatch_threads(MTL::Size threads, MTL::Size group) {
  if (encoder_) {
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
    auto library = device.get_library(library_name, [&] { return text; });
    for (const KernelName& name : names) {
      known(device).keep(name, device.get_kernel(name.host(), library));
      done(++count);
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
