// The launches of an expert layer, which ops and blocks share.
#pragma once

#include "formats/format.h"
#include "metal/params.h"
#include "metal/pipelines.h"
#include "mlx/mlx.h"
#include "ops.h"
#include "ops/metal_blocks.h"

namespace glm_fused::metal {

// The planes of gate, up and down.
struct MlpWeights {
  const mx::array *gate, *up, *down;
  const MlpFormats& formats;
};

// Gives the parameters of a launch without shared experts or residual.
MoeParams moe_params(
    const mx::array& x,
    const mx::array& slots,
    const MlpWeights& routed);

// Binds what the launches of gate and up, and those of down, begin with: their
// vectors, what tells the slots of these, and weights.
void bind_gate_up(
    Encoder& encoder,
    const mx::array& x,
    const mx::array& slots,
    const MlpWeights& routed);
void bind_down(
    Encoder& encoder,
    const mx::array& act,
    const mx::array& slots,
    const MlpWeights& routed);

// Encodes moe_decode. To its result, rounded, that of the `shared` experts is
// added, and this to `residual`. `shared_act` is what their gate and up gave,
// where that has been encoded before.
void experts(
    const mx::Stream& stream,
    const mx::array& x,
    const mx::array& slots,
    const mx::array& scores,
    const MlpWeights& routed,
    const MlpWeights* shared,
    const mx::array* residual,
    mx::array& y,
    const mx::array* shared_act = nullptr);

// Encodes moe_decode of a prompt's tokens, grouped by slot.
void grouped_experts(
    const mx::Stream& stream,
    const mx::array& x,
    const mx::array& slots,
    const mx::array& scores,
    const MlpWeights& routed,
    mx::array& y);

// Encodes the sum of y [t, top_k, hidden] times scores over the choices.
void expert_sum(
    Encoder& encoder,
    const mx::array& y,
    const mx::array& scores,
    mx::array& sum);

// Encodes the choice of router_topk, given logits [tokens, experts].
void choose(
    const mx::Stream& stream,
    const mx::array& logits,
    const mx::array& bias,
    const Routing& routing,
    mx::array& chosen,
    mx::array& shares);

}  // namespace glm_fused::metal
