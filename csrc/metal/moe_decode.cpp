#include <algorithm>
#include <bit>

#include "metal/experts.h"
#include "metal/pipelines.h"
#include "metal/source.h"
#include "primitives.h"

namespace glm_fused {

namespace metal {

MoeParams moe_params(
    const mx::array& x,
    const mx::array& slots,
    const MlpWeights& routed) {
  return {
      slots.shape(0),
      slots.shape(1),
      x.shape(-1),
      routed.gate->shape(1),
      routed.gate->shape(0),
      0,
      false};
}

void bind_gate_up(
    Encoder& encoder,
    const mx::array& x,
    const mx::array& slots,
    const MlpWeights& routed) {
  encoder.set_input_array(x, 0);
  encoder.set_input_array(slots, 1);
  bind_weight(encoder, routed.gate, routed.formats.gate, 2);
  bind_weight(encoder, routed.up, routed.formats.up, 5);
}

void bind_down(
    Encoder& encoder,
    const mx::array& act,
    const mx::array& slots,
    const MlpWeights& routed) {
  encoder.set_input_array(act, 0);
  encoder.set_input_array(slots, 1);
  bind_weight(encoder, routed.down, routed.formats.down, 2);
}

void experts(
    const mx::Stream& stream,
    const mx::array& x,
    const mx::array& slots,
    const mx::array& scores,
    const MlpWeights& routed,
    const MlpWeights* shared,
    const mx::array* residual,
    mx::array& y,
    const mx::array* shared_act) {
  Encoder encoder(stream);
  const Tiles& tiles = encoder.tiles();
  MoeParams params = moe_params(x, slots, routed);
  params.shared_intermediate = shared ? shared->gate->shape(0) : 0;
  params.adds = residual != nullptr;
  const int pairs = params.tokens * params.top_k;
  const int hidden = params.hidden, intermediate = params.intermediate;
  // Whether the shared experts' gate and up are part of the launch.
  const bool together = shared && !shared_act;
  const int wide = params.shared_intermediate;
  const int vectors =
      static_cast<int>(std::bit_ceil(static_cast<unsigned>(params.tokens)));
  const size_t links = threadgroup_bytes(pairs);
  // Without shared experts these are bound and never touched.
  const MlpWeights& other = shared ? *shared : routed;

  auto act = allocate({pairs, intermediate}, x.dtype());
  encoder.add_temporary(act);
  KernelName name(
      metal_source::moe_decode,
      "moe_gate_up",
      {x.dtype(),
       Argument::row(routed.formats.gate, intermediate, hidden),
       Argument::row(routed.formats.up, intermediate, hidden),
       tiles.rows,
       vectors});
  if (together) {
    name.add(true);
    name.add(Argument::row(shared->formats.gate, wide, hidden));
    name.add(Argument::row(shared->formats.up, wide, hidden));
  }
  auto* gate_up = encoder.kernel(name);
  encoder.set_compute_pipeline_state(gate_up);
  bind_gate_up(encoder, x, slots, routed);
  encoder.set_output_array(act, 8);
  encoder.set_bytes(params, 9);
  bind_weight(encoder, other.gate, other.formats.gate, 10);
  bind_weight(encoder, other.up, other.formats.up, 13);
  auto other_act = shared_act ? *shared_act : act;
  if (together) {
    other_act = allocate({params.tokens, wide}, x.dtype());
    encoder.add_temporary(other_act);
    encoder.set_output_array(other_act, 16);
  } else {
    encoder.set_input_array(x, 16);
  }
  encoder.set_threadgroup_memory_length(links, 0);
  int simdgroups = metal::simdgroups(gate_up, tiles.gate_up);
  encoder.dispatch_threadgroups(
      MTL::Size(
          blocks(
              std::max(intermediate, together ? wide : 0),
              tiles.rows * simdgroups),
          pairs + (together ? 1 : 0),
          1),
      MTL::Size(32, simdgroups, 1));

  name = KernelName(
      metal_source::moe_decode,
      "moe_down_sum",
      {x.dtype(),
       Argument::row(routed.formats.down, hidden, intermediate),
       tiles.rows,
       vectors});
  if (shared) {
    name.add(true);
    name.add(Argument::row(shared->formats.down, hidden, wide));
  }
  auto* down_sum = encoder.kernel(name);
  encoder.set_compute_pipeline_state(down_sum);
  bind_down(encoder, act, slots, routed);
  encoder.set_input_array(scores, 5);
  encoder.set_output_array(y, 6);
  encoder.set_bytes(params, 7);
  bind_weight(encoder, other.down, other.formats.down, 8);
  encoder.set_input_array(other_act, 11);
  encoder.set_input_array(residual ? *residual : x, 12);
  encoder.set_threadgroup_memory_length(links, 0);
  const size_t terms = pairs + (shared ? params.tokens : 0);
  encoder.set_threadgroup_memory_length(
      threadgroup_bytes(terms * tiles.rows), 1);
  simdgroups = metal::simdgroups(down_sum, tiles.down);
  encoder.dispatch_threadgroups(
      MTL::Size(blocks(hidden, tiles.rows), 1, 1),
      MTL::Size(32, simdgroups, 1));
}

}  // namespace metal

void MoeDecode::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& y = outputs[0];
  metal::allocate(y);
  if (y.size() == 0) {
    return;
  }
  const mx::array* const gate = &inputs[3];
  const mx::array* const up = gate + gate_.spec->plane_count;
  const MlpFormats formats{gate_, up_, down_};
  const metal::MlpWeights routed{gate, up, up + up_.spec->plane_count, formats};
  if (prompt_) {
    metal::grouped_experts(
        stream(), inputs[0], inputs[1], inputs[2], routed, y);
  } else {
    metal::experts(
        stream(), inputs[0], inputs[1], inputs[2], routed, nullptr, nullptr, y);
  }
}

}  // namespace glm_fused
