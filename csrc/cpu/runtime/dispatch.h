// How a graph node's work reaches MLX's CPU stream.
#pragma once

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"

namespace glm_fused::cpu {

// Enqueues `work` of a primitive, allocating all that it takes first: MLX
// counts a task before it makes one of a function too large for a pointer, and
// waits for ever for those that were counted and not made. Of what `work`
// throws MLX keeps the text alone: that of a failed allocation is one that says
// where.
template <class Work>
void enqueue(mlx::core::Primitive& primitive, Work work) {
  struct Kept {
    const char* name;
    Work work;
  };
  auto* kept = new Kept{primitive.name(), std::move(work)};
  mlx::core::cpu::get_command_encoder(primitive.stream()).dispatch([kept] {
    const std::unique_ptr<Kept> owned(kept);
    try {
      owned->work();
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(
          "[" + std::string(owned->name) + "] out of memory.");
    }
  });
}

// Allocates the outputs and enqueues task(inputs, outputs); nothing is enqueued
// for empty outputs. MLX keeps the arrays alive until the task has run, so the
// task holds weak copies. What it throws, evaluation raises.
template <class Task>
void dispatch(
    mlx::core::Primitive& primitive,
    const std::vector<mlx::core::array>& inputs,
    std::vector<mlx::core::array>& outputs,
    Task task) {
  auto& encoder = mlx::core::cpu::get_command_encoder(primitive.stream());
  std::vector<mlx::core::array> in, out;
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
    in.push_back(mlx::core::array::unsafe_weak_copy(input));
  }
  for (auto& output : outputs) {
    output.set_data(mlx::core::allocator::malloc(output.nbytes()));
    if (output.nbytes() > 0 && output.buffer().ptr() == nullptr) {
      throw std::runtime_error(  // which MLX leaves to whoever writes there
          "[" + std::string(primitive.name()) + "] out of memory for " +
          std::to_string(output.nbytes()) + " bytes of output.");
    }
    encoder.set_output_array(output);
    out.push_back(mlx::core::array::unsafe_weak_copy(output));
  }
  if (outputs[0].size() > 0) {
    enqueue(
        primitive,
        [in = std::move(in),
         out = std::move(out),
         task = std::move(task)]() mutable { task(in, out); });
  }
}

}  // namespace glm_fused::cpu
