// The simulator runs MLX's Metal host classes: what `eval_gpu` encodes is
// launched on the CPU, in order, on the stream that MLX gave the primitive.
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/backend/metal/device.h"
#include "sim/host/launches.h"

namespace mlx::core {

namespace metal {

namespace {

// A Mac grants these to every kernel, unless its attribute takes fewer threads.
constexpr size_t kMaxBytes = 4096;
constexpr size_t kMaxThreadgroupMemory = 32768;
constexpr size_t kMaxThreads = 1024;

struct Encoder {
  Stream stream;
  CommandEncoder encoder;
  MTL::ComputeCommandEncoder metal;

  Encoder(Device& d, Stream s)
      : stream(s), encoder(d, s.index, d.residency_sets()) {}
};

std::mutex encoders_mutex;
std::map<int, std::unique_ptr<Encoder>>& encoders() {
  static auto* all = new std::map<int, std::unique_ptr<Encoder>>();
  return *all;
}

Encoder& state_of(const CommandEncoder* encoder) {
  std::lock_guard lock(encoders_mutex);
  for (auto& [index, e] : encoders()) {
    if (&e->encoder == encoder) {
      return *e;
    }
  }
  throw std::logic_error("[metal-sim] unknown command encoder");
}

uint32_t narrow(NS::UInteger n) {
  return static_cast<uint32_t>(n);
}

sim_host::Launch
noted(const std::string& name, const MTL::Size& grid, const MTL::Size& group) {
  return {
      name,
      {narrow(grid.width), narrow(grid.height), narrow(grid.depth)},
      {narrow(group.width), narrow(group.height), narrow(group.depth)},
      nullptr,
      {}};
}

void launch(
    const MTL::ComputeCommandEncoder& bound,
    MTL::Size grid,
    MTL::Size group,
    bool threads) {
  const sim_host::Settings settings = sim_host::settings();
  sim_host::Launch done = noted(bound.state->name, grid, group);
  auto* pipeline = static_cast<sim_pipeline*>(bound.state->pipeline);
  if (pipeline == nullptr) {
    sim_host::keep(std::move(done));
    return;
  }
  std::vector<sim_buffer> buffers, memory;
  for (const auto& [index, b] : bound.buffers) {
    // Metal aligns what it allocates.
    buffers.push_back({index, b.data, b.size, narrow(b.offset % 16)});
  }
  for (const auto& [index, b] : bound.bytes) {
    buffers.push_back({index, const_cast<char*>(b.data()), b.size(), 0});
  }
  for (const auto& [index, size] : bound.threadgroup_memory) {
    memory.push_back({index, nullptr, size, 0});
  }
  sim_dispatch dispatch{};
  std::copy_n(done.groups, 3, dispatch.groups);
  std::copy_n(done.group, 3, dispatch.group);
  dispatch.threads = threads;
  dispatch.buffers = buffers.data();
  dispatch.buffer_count = narrow(buffers.size());
  dispatch.threadgroup_memory = memory.data();
  dispatch.threadgroup_memory_count = narrow(memory.size());
  dispatch.workers = settings.workers;
  dispatch.in_place = settings.in_place;
  const auto& run = sim_host::executor();
  done.report = run.launch(pipeline, &dispatch);
  const char* failed = run.error(done.report);
  const std::string error = failed ? failed : "";
  const size_t used = run.counts(done.report)->threadgroup_bytes;
  if (settings.keep_outputs) {
    for (const int index : bound.outputs) {
      const auto& b = bound.buffers.at(index);
      done.outputs[index].assign(static_cast<const char*>(b.data), b.size);
    }
  }
  sim_host::keep(std::move(done));
  if (!error.empty()) {
    throw std::runtime_error("[metal-sim] " + bound.state->name + ": " + error);
  }
  if (used > kMaxThreadgroupMemory) {
    throw std::runtime_error(
        "[metal-sim] " + bound.state->name + " uses " + std::to_string(used) +
        " bytes of threadgroup memory; at most 32768 are safe.");
  }
}

void dispatch(
    CommandEncoder* encoder,
    MTL::Size grid,
    MTL::Size group,
    bool threads) {
  Encoder& e = state_of(encoder);
  if (e.metal.state == nullptr) {
    throw std::logic_error("[metal-sim] dispatch without a pipeline state");
  }
  const size_t asked = group.width * group.height * group.depth;
  const size_t most = e.metal.state->maxTotalThreadsPerThreadgroup();
  if (asked > most) {
    throw std::runtime_error(
        "[metal-sim] " + e.metal.state->name + " is launched with " +
        std::to_string(asked) + " threads in a threadgroup; it takes " +
        std::to_string(most) + ".");
  }
  cpu::get_command_encoder(e.stream).dispatch(
      [bound = e.metal, grid, group, threads] {
        launch(bound, grid, group, threads);
      });
  e.metal.buffers.clear();
  e.metal.outputs.clear();
  e.metal.bytes.clear();
  e.metal.threadgroup_memory.clear();
}

// As MLX reads it from the architecture's last three characters.
int generation(const std::string& architecture) {
  const size_t end = architecture.size();
  return 10 * (architecture.at(end - 3) - '0') +
      (architecture.at(end - 2) - '0');
}

}  // namespace

ResidencySets::ResidencySets(MTL::Device*) {}
ResidencySets::~ResidencySets() {}

Device::Device()
    : residency_sets_(nullptr),
      arch_(sim_host::settings().architecture),
      arch_gen_(generation(arch_)),
      max_ops_per_buffer_(1),
      max_mb_per_buffer_(1) {}
Device::~Device() {}

Device& device(mlx::core::Device) {
  static std::mutex mutex;
  static auto& all = *new std::map<int, std::unique_ptr<Device>>();
  std::lock_guard lock(mutex);
  auto& slot = all[sim_host::settings().device];
  if (!slot) {
    slot = std::make_unique<Device>();
  }
  return *slot;
}

MTL::Library* Device::get_library(
    const std::string& name,
    const CompileOptions& compile_options,
    const std::function<std::string(void)>& builder) {
  if (compile_options.math_mode != MathMode::Safe) {
    throw std::runtime_error("[metal-sim] only safe math is simulated");
  }
  // MLX hands the pointer through and does not look behind it.
  return reinterpret_cast<MTL::Library*>(
      const_cast<sim_host::Library*>(sim_host::library(name, builder)));
}

MTL::ComputePipelineState* Device::get_kernel(
    const std::string& base_name,
    MTL::Library* mtl_lib,
    const std::string& hash_name,
    const MTLFCList& func_consts,
    const std::vector<MTL::Function*>&) {
  static std::mutex mutex;
  static auto* made = new std::map<
      std::pair<MTL::Library*, std::string>,
      std::unique_ptr<MTL::ComputePipelineState>>();
  std::lock_guard lock(mutex);
  auto& slot = (*made)[{mtl_lib, hash_name.empty() ? base_name : hash_name}];
  if (slot) {
    return slot.get();
  }
  const auto* library = reinterpret_cast<const sim_host::Library*>(mtl_lib);
  if (library->opened == nullptr) {
    slot.reset(new MTL::ComputePipelineState{base_name, nullptr, kMaxThreads});
    return slot.get();
  }
  std::vector<sim_constant> constants;
  for (const auto& [value, type, index] : func_consts) {
    const size_t size = type == MTL::DataTypeBool ? 1 : 4;
    constants.push_back({static_cast<int32_t>(index), nullptr, value, size});
  }
  char error[4096] = "";
  sim_pipeline* pipeline = sim_host::executor().specialize(
      library->opened,
      (library->prefix + base_name).c_str(),
      constants.data(),
      constants.size(),
      error,
      sizeof(error));
  if (pipeline == nullptr) {
    throw std::runtime_error("[metal-sim] " + base_name + ": " + error);
  }
  slot.reset(new MTL::ComputePipelineState{
      base_name, pipeline, sim_host::executor().most_threads(pipeline)});
  return slot.get();
}

CommandEncoder::CommandEncoder(Device& d, int, ResidencySets& sets)
    : device_(d), residency_sets_(sets) {}
CommandEncoder::~CommandEncoder() {}

CommandEncoder& get_command_encoder(Stream s) {
  std::lock_guard lock(encoders_mutex);
  auto& slot = encoders()[s.index];
  if (!slot) {
    slot = std::make_unique<Encoder>(device(s.device), s);
  }
  return slot->encoder;
}

MTL::ComputeCommandEncoder* CommandEncoder::get_command_encoder() {
  return &state_of(this).metal;
}

void CommandEncoder::set_input_array(const array& a, int idx, int64_t offset) {
  const size_t size = a.data_size() * a.itemsize();
  char* data = const_cast<char*>(a.data<char>());
  state_of(this).metal.buffers[idx] = {
      data + offset, size - offset, static_cast<size_t>(a.offset() + offset)};
}

void CommandEncoder::set_output_array(array& a, int idx, int64_t offset) {
  set_input_array(a, idx, offset);
  state_of(this).metal.outputs.insert(idx);
  const auto& b = state_of(this).metal.buffers[idx];
  sim_host::fill_new(a.buffer().ptr(), b.data, b.size);
}

void CommandEncoder::add_temporary(array arr) {
  cpu::get_command_encoder(state_of(this).stream).add_temporary(arr);
}

void CommandEncoder::add_temporaries(std::vector<array> arrays) {
  cpu::get_command_encoder(state_of(this).stream)
      .add_temporaries(std::move(arrays));
}

void CommandEncoder::end_encoding(bool) {}

// Launches are run as they come; `completion` is called after those so far.
void CommandEncoder::commit(std::function<void()> completion) {
  if (completion) {
    sim_host::count_wait();
    cpu::get_command_encoder(state_of(this).stream)
        .dispatch(std::move(completion));
  }
}

void CommandEncoder::dispatch_threadgroups(MTL::Size grid, MTL::Size group) {
  dispatch(this, grid, group, false);
}

void CommandEncoder::dispatch_threads(MTL::Size grid, MTL::Size group) {
  dispatch(this, grid, group, true);
}

}  // namespace metal
}  // namespace mlx::core

void MTL::ComputeCommandEncoder::setBytes(
    const void* from,
    NS::UInteger length,
    NS::UInteger index) {
  if (length > mlx::core::metal::kMaxBytes) {
    throw std::runtime_error("[metal-sim] setBytes takes at most 4096 bytes");
  }
  const char* first = static_cast<const char*>(from);
  bytes[static_cast<int>(index)].assign(first, first + length);
}
