#include <bit>

#include "metal/params.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "metal/tiles.h"
#include "primitives.h"

namespace glm_fused {

namespace {

using metal::format_name;

std::string joined(const std::string& name, std::vector<std::string> args) {
  std::string text = name + "<" + args[0];
  for (size_t i = 1; i < args.size(); i++) {
    text += ", " + args[i];
  }
  return text + ">";
}

int blocks(int count, int size) {
  return (count + size - 1) / size;
}

}  // namespace

void MoeDecode::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto &x = inputs[0], &slots = inputs[1], &scores = inputs[2];
  auto& y = outputs[0];
  y.set_data(mx::allocator::malloc(y.nbytes()));
  if (y.size() == 0) {
    return;
  }
  auto& device = mx::metal::device(stream().device);
  auto& encoder = mx::metal::get_command_encoder(stream());
  const auto tiles = metal::tiles_for(device.get_architecture());

  const mx::array& gate = inputs[3];
  const MoeParams params{
      x.shape(0), slots.shape(1), x.shape(1), gate.shape(1), gate.shape(0)};
  const int pairs = params.tokens * params.top_k;
  const int hidden = params.hidden, intermediate = params.intermediate;
  const std::string type = metal::type_name(x.dtype());
  const std::string rows = std::to_string(tiles.rows);
  const std::string vectors =
      std::to_string(std::bit_ceil(static_cast<unsigned>(params.tokens)));
  const size_t links = metal::threadgroup_bytes(pairs);
  size_t next = 3;

  auto act = metal::allocate({pairs, intermediate}, x.dtype());
  encoder.add_temporary(act);
  auto gate_up = metal::kernel(
      device,
      metal_source::moe_decode,
      joined(
          "moe_gate_up",
          {type,
           format_name(gate_, intermediate, hidden),
           format_name(up_, intermediate, hidden),
           rows,
           vectors}));
  encoder.set_compute_pipeline_state(gate_up);
  encoder.set_input_array(x, 0);
  encoder.set_input_array(slots, 1);
  metal::bind_weight(encoder, inputs, next, gate_, 2);
  metal::bind_weight(encoder, inputs, next, up_, 5);
  encoder.set_output_array(act, 8);
  encoder.set_bytes(params, 9);
  encoder.set_threadgroup_memory_length(links, 0);
  int simdgroups = metal::simdgroups(gate_up, tiles.gate_up);
  encoder.dispatch_threadgroups(
      MTL::Size(blocks(intermediate, tiles.rows * simdgroups), pairs, 1),
      MTL::Size(32, simdgroups, 1));

  auto down_sum = metal::kernel(
      device,
      metal_source::moe_decode,
      joined(
          "moe_down_sum",
          {type, format_name(down_, hidden, intermediate), rows, vectors}));
  encoder.set_compute_pipeline_state(down_sum);
  encoder.set_input_array(act, 0);
  encoder.set_input_array(slots, 1);
  metal::bind_weight(encoder, inputs, next, down_, 2);
  encoder.set_input_array(scores, 5);
  encoder.set_output_array(y, 6);
  encoder.set_bytes(params, 7);
  encoder.set_threadgroup_memory_length(links, 0);
  encoder.set_threadgroup_memory_length(
      metal::threadgroup_bytes(static_cast<size_t>(pairs) * tiles.rows), 1);
  simdgroups = metal::simdgroups(down_sum, tiles.down);
  encoder.dispatch_threadgroups(
      MTL::Size(blocks(hidden, tiles.rows), 1, 1),
      MTL::Size(32, simdgroups, 1));
}

}  // namespace glm_fused
