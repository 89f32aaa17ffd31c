#include "metal/params.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "metal/tiles.h"
#include "primitives.h"

namespace glm_fused {

void RouterTopk::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto &x = inputs[0], &weight = inputs[1], &bias = inputs[2];
  for (auto& output : outputs) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
  }
  if (outputs[0].size() == 0) {
    return;
  }
  auto& device = mx::metal::device(stream().device);
  auto& encoder = mx::metal::get_command_encoder(stream());
  const auto tiles = metal::tiles_for(device.get_architecture());
  const RouterParams params{
      x.shape(1),
      routing_.top_k,
      routing_.topk_group,
      routing_.norm_topk_prob,
      routing_.routed_scaling_factor};
  auto kernel = metal::kernel(
      device,
      metal_source::router_topk,
      "router_topk<" + metal::type_name(x.dtype()) + ", " +
          metal::type_name(weight.dtype()) + ", " +
          std::to_string(weight.shape(0)) + ", " +
          std::to_string(routing_.n_group) + ">");
  encoder.set_compute_pipeline_state(kernel);
  encoder.set_input_array(x, 0);
  encoder.set_input_array(weight, 1);
  encoder.set_input_array(bias, 2);
  encoder.set_output_array(outputs[0], 3);
  encoder.set_output_array(outputs[1], 4);
  encoder.set_bytes(params, 5);
  encoder.dispatch_threadgroups(
      MTL::Size(x.shape(0), 1, 1),
      MTL::Size(32, metal::simdgroups(kernel, tiles.router), 1));
}

}  // namespace glm_fused
