#include <algorithm>
#include <bit>

#include "formats/weight.h"
#include "metal/experts.h"
#include "metal/params.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "primitives.h"

namespace glm_fused {

namespace {

constexpr int kMaxVectors = 8;  // tokens that share a read of a row
constexpr int kSelectSimdgroups = 8;

// Tells whether rows of k values start at multiples of four.
bool aligned(const mx::array& rows, int k) {
  return k % 4 == 0 && rows.offset() % (4 * rows.itemsize()) == 0;
}

RouterParams
params_of(int tokens, int hidden, int experts, const Routing& routing) {
  return {
      tokens,
      hidden,
      experts,
      routing.top_k,
      routing.topk_group,
      routing.norm_topk_prob,
      routing.routed_scaling_factor};
}

}  // namespace

namespace metal {

void choose(
    const mx::Stream& stream,
    const mx::array& logits,
    const mx::array& bias,
    const Routing& routing,
    mx::array& chosen,
    mx::array& shares) {
  Encoder encoder(stream);
  const int tokens = logits.shape(0), experts = logits.shape(1);
  const RouterParams params = params_of(tokens, 0, experts, routing);
  auto* select = encoder.kernel(
      {metal_source::router_topk, "router_select", {experts, routing.n_group}});
  encoder.set_compute_pipeline_state(select);
  encoder.set_input_array(logits, 0);
  encoder.set_input_array(bias, 1);
  encoder.set_output_array(chosen, 2);
  encoder.set_output_array(shares, 3);
  encoder.set_bytes(params, 4);
  encoder.dispatch_threadgroups(
      MTL::Size(tokens, 1, 1), MTL::Size(32, kSelectSimdgroups, 1));
}

}  // namespace metal

void RouterTopk::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto &x = inputs[0], &weight = inputs[1], &bias = inputs[2];
  for (auto& output : outputs) {
    metal::allocate(output);
  }
  if (outputs[0].size() == 0) {
    return;
  }
  metal::Encoder encoder(stream());
  const int experts = weight.shape(0);
  const RouterParams params =
      params_of(x.shape(0), x.shape(1), experts, routing_);
  const bool vectors =
      aligned(x, params.hidden) && aligned(weight, params.hidden);
  const int width = static_cast<int>(std::bit_ceil(
      static_cast<unsigned>(std::min(params.tokens, kMaxVectors))));

  auto logits = metal::allocate({params.tokens, experts}, mx::float32);
  encoder.add_temporary(logits);
  const Format format = dense_format(float_type_of(weight.dtype()));
  const auto row = vectors
      ? metal::Argument::row_of_fours(weight.dtype())
      : metal::Argument::row(format, experts, params.hidden);
  auto* score = encoder.kernel(
      {metal_source::router_topk, "router_logits", {x.dtype(), row, width}});
  encoder.set_compute_pipeline_state(score);
  encoder.set_input_array(x, 0);
  encoder.set_input_array(weight, 1);
  encoder.set_output_array(logits, 2);
  encoder.set_bytes(params, 3);
  const int simdgroups = metal::simdgroups(score, encoder.tiles().router);
  encoder.dispatch_threadgroups(
      MTL::Size(
          (experts + simdgroups - 1) / simdgroups,
          (params.tokens + width - 1) / width,
          1),
      MTL::Size(32, simdgroups, 1));

  metal::choose(stream(), logits, bias, routing_, outputs[0], outputs[1]);
}

}  // namespace glm_fused
