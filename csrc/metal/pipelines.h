// Kernels compiled at run time, each an instance of a template in a shader, and
// the encoder that launches them.
#pragma once

#include <functional>
#include <vector>

#include "formats/format.h"
#include "metal/kernel_name.h"
#include "metal/tiles.h"
#include "mlx/backend/metal/device.h"
#include "ops.h"

namespace glm_fused::metal {

// While it lives, launchers of this thread encode nothing, and the kernels that
// they ask for are collected.
class Rehearsal {
 public:
  Rehearsal();
  ~Rehearsal();
  Rehearsal(const Rehearsal&) = delete;

  // Those that are not compiled yet, once each.
  std::vector<KernelName> missing;
};

struct Known;  // what is kept of a device

// MLX's encoder of a stream, which in a rehearsal does nothing.
class Encoder {
 public:
  explicit Encoder(const mx::Stream& stream);

  const Tiles& tiles() const;

  // Gives the kernel, which is compiled on first use; null in a rehearsal.
  MTL::ComputePipelineState* kernel(const KernelName& name);

  void set_compute_pipeline_state(MTL::ComputePipelineState* kernel);
  void set_input_array(const mx::array& a, int index);
  void set_output_array(mx::array& a, int index);
  void set_threadgroup_memory_length(size_t bytes, int index);
  template <class T>
  void set_bytes(const T& value, int index) {
    if (encoder_) {
      encoder_->set_bytes(value, index);
    }
  }
  void add_temporary(const mx::array& a);
  void add_temporaries(std::vector<mx::array> arrays);
  // Has the GPU begin what is encoded; `done` is called once it has done it.
  void begin(std::function<void()> done = nullptr);
  // Whether it does nothing.
  bool rehearses() const {
    return encoder_ == nullptr;
  }
  void dispatch_threadgroups(MTL::Size groups, MTL::Size group);
  void dispatch_threads(MTL::Size threads, MTL::Size group);

 private:
  mx::metal::Device& device_;
  Known& known_;
  mx::metal::CommandEncoder* encoder_;  // null in a rehearsal
};

// Compiles kernels that a rehearsal found to be missing, those of a shader
// together; `done` is told how many there are after each.
void compile(
    const std::vector<KernelName>& missing,
    const std::function<void(int)>& done);

// Gives `wanted` simdgroups, or as many as the kernel's registers allow.
int simdgroups(MTL::ComputePipelineState* kernel, int wanted);

size_t threadgroup_bytes(size_t words);

// Gives how many blocks of `size` hold `count`.
inline int blocks(int count, int size) {
  return (count + size - 1) / size;
}

// Gives an array its memory, which in a rehearsal is none to speak of.
void allocate(mx::array& a);
mx::array allocate(mx::Shape shape, mx::Dtype dtype);

// Binds a weight's planes to kMaxPlanes buffers from `index` on; what a format
// lacks is bound to the first one and never read.
void bind_weight(
    Encoder& encoder,
    const mx::array* planes,
    const Format& format,
    int index);

}  // namespace glm_fused::metal
