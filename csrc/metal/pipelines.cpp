#include "metal/pipelines.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "formats/families.h"
#include "metal/kernel_list.h"

namespace glm_fused::metal {

namespace {

std::string type_name(FloatType type) {
  return type == FloatType::float32 ? "float"
      : type == FloatType::float16  ? "float16_t"
                                    : "bfloat16_t";
}

// Spells template arguments in the characters of an identifier.
std::string host_name(std::string function) {
  std::replace_if(
      function.begin(),
      function.end(),
      [](unsigned char c) { return !std::isalnum(c); },
      '_');
  return "glm_fused_" + function;
}

// The kernels that have been asked for.
class List {
 public:
  void note(
      MTL::ComputePipelineState* kernel,
      const std::string& name,
      double seconds) {
    std::lock_guard lock(mutex_);
    uses_++;
    if (known_.insert(kernel).second) {
      kernels_.push_back(
          {name,
           static_cast<int>(kernel->maxTotalThreadsPerThreadgroup()),
           static_cast<int>(kernel->staticThreadgroupMemoryLength()),
           seconds});
    }
  }
  std::vector<ListedKernel> kernels() {
    std::lock_guard lock(mutex_);
    return kernels_;
  }
  int64_t take_uses() {
    std::lock_guard lock(mutex_);
    return std::exchange(uses_, 0);
  }

 private:
  std::mutex mutex_;
  std::unordered_set<const MTL::ComputePipelineState*> known_;
  std::vector<ListedKernel> kernels_;
  int64_t uses_ = 0;
};

// This is never destroyed, as MLX's threads may outlive the module.
List& list() {
  static List& list = *new List;
  return list;
}

MTL::ComputePipelineState* find_kernel(
    mx::metal::Device& device,
    const char* source,
    const std::string& function) {
  if (function.find('<') == std::string::npos) {
    auto library =
        device.get_library("glm_fused_" + function, [&] { return source; });
    return device.get_kernel(function, library);
  }
  const std::string name = host_name(function);
  auto library = device.get_library(name, [&] {
    return std::string(source) + "template [[host_name(\"" + name +
        "\")]] [[kernel]] decltype(" + function + ") " + function + ";\n";
  });
  return device.get_kernel(name, library);
}

}  // namespace

std::vector<ListedKernel> listed_kernels() {
  return list().kernels();
}

int64_t take_uses() {
  return list().take_uses();
}

std::string type_name(mx::Dtype dtype) {
  return dtype == mx::float32 ? type_name(FloatType::float32)
      : dtype == mx::float16  ? type_name(FloatType::float16)
                              : type_name(FloatType::bfloat16);
}

std::string format_name(const Format& f, int n, int k) {
  return with_family(f.family(), [&]<class Tag>(Tag) {
    return RowOf<Tag::value>::type::shader(
        f, type_name(f.float_type), uses_fast_order(f, n, k));
  });
}

MTL::ComputePipelineState* kernel(
    mx::metal::Device& device,
    const char* source,
    const std::string& function) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  auto* found = find_kernel(device, source, function);
  const std::chrono::duration<double> taken = Clock::now() - start;
  list().note(found, function, taken.count());
  return found;
}

int simdgroups(MTL::ComputePipelineState* kernel, int wanted) {
  const int most = static_cast<int>(kernel->maxTotalThreadsPerThreadgroup());
  return std::clamp(most / 32, 1, wanted);
}

// Metal takes threadgroup memory in steps of 16 bytes.
size_t threadgroup_bytes(size_t words) {
  return (4 * words + 15) / 16 * 16;
}

mx::array allocate(mx::Shape shape, mx::Dtype dtype) {
  mx::array a(std::move(shape), dtype, nullptr, {});
  a.set_data(mx::allocator::malloc(a.nbytes()));
  return a;
}

void bind_weight(
    mx::metal::CommandEncoder& encoder,
    const mx::array* planes,
    const Format& format,
    int index) {
  for (int p = 0; p < kMaxPlanes; p++) {
    const bool present = p < format.spec->plane_count;
    encoder.set_input_array(planes[present ? p : 0], index + p);
  }
}

}  // namespace glm_fused::metal
