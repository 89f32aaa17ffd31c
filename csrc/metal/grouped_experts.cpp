#include "metal/experts.h"
#include "metal/pipelines.h"
#include "metal/source.h"

namespace glm_fused::metal {

namespace {

// As metal/grouped_experts.h has them.
constexpr int kSortSimdgroups = 8;
constexpr int kGroupSimdgroups = 4;
constexpr int kGateUpRows = 32;
constexpr int kDownRows = 64;

// Tells whether vectors of k values begin where four of them may be read.
bool in_fours(const mx::array& x, int k) {
  return k % 4 == 0 && x.offset() % (4 * x.itemsize()) == 0;
}

}  // namespace

void grouped_experts(
    const mx::Stream& stream,
    const mx::array& x,
    const mx::array& slots,
    const mx::array& scores,
    const MlpWeights& routed,
    mx::array& y) {
  Encoder encoder(stream);
  const MoeParams params = moe_params(x, slots, routed);
  const int pairs = params.tokens * params.top_k;
  const int hidden = params.hidden, intermediate = params.intermediate;
  const MTL::Size threads(32, kGroupSimdgroups, 1);

  auto order = allocate({pairs}, mx::int32);
  auto groups = allocate({params.bank + 1, 2}, mx::int32);
  auto act = allocate({pairs, intermediate}, x.dtype());
  auto terms = allocate({params.tokens, params.top_k, hidden}, x.dtype());
  encoder.add_temporaries({order, groups, act, terms});

  encoder.set_compute_pipeline_state(
      encoder.kernel({metal_source::grouped_experts, "group_pairs"}));
  encoder.set_input_array(slots, 0);
  encoder.set_output_array(order, 1);
  encoder.set_output_array(groups, 2);
  encoder.set_bytes(params, 3);
  encoder.dispatch_threadgroups(
      MTL::Size(params.bank + 1, 1, 1), MTL::Size(32, kSortSimdgroups, 1));

  encoder.set_compute_pipeline_state(encoder.kernel(
      {metal_source::grouped_experts,
       "grouped_gate_up",
       {x.dtype(),
        Argument::row(routed.formats.gate, intermediate, hidden),
        Argument::row(routed.formats.up, intermediate, hidden),
        in_fours(x, hidden)}}));
  bind_gate_up(encoder, x, order, routed);
  encoder.set_input_array(groups, 8);
  encoder.set_output_array(act, 9);
  encoder.set_bytes(params, 10);
  encoder.dispatch_threadgroups(
      MTL::Size(blocks(intermediate, kGateUpRows), params.bank, 1), threads);

  encoder.set_compute_pipeline_state(encoder.kernel(
      {metal_source::grouped_experts,
       "grouped_down",
       {x.dtype(),
        Argument::row(routed.formats.down, hidden, intermediate),
        in_fours(act, intermediate)}}));
  bind_down(encoder, act, order, routed);
  encoder.set_input_array(groups, 5);
  encoder.set_output_array(terms, 6);
  encoder.set_bytes(params, 7);
  encoder.dispatch_threadgroups(
      MTL::Size(blocks(hidden, kDownRows), params.bank + 1, 1), threads);

  expert_sum(encoder, terms, scores, y);
}

}  // namespace glm_fused::metal
