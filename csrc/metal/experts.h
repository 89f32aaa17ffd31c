// The launches of an expert layer, which ops and blocks share.
#pragma once

#include "formats/format.h"
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
