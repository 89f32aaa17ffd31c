#include "binding_types.h"
#include "ops/bindings.h"
#include "ops/metal_blocks.h"
#include "slots/bindings.h"

namespace glm_fused {

using namespace nb::literals;

void bind_blocks(nb::module_& m) {
  m.def(
      "attention_project",
      [](const mx::array& x,
         const mx::array& cosines,
         const mx::array& sines,
         const NormTuple& input_norm,
         const WeightTuple& q_a,
         const NormTuple& q_a_norm,
         const WeightTuple& q_b,
         const WeightTuple& kv_a,
         const NormTuple& kv_a_norm,
         const WeightTuple& embed_q,
         int nope_dim,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const AttentionProjections p{
            norm(input_norm),
            weight(q_a),
            norm(q_a_norm),
            weight(q_b),
            weight(kv_a),
            norm(kv_a_norm),
            weight(embed_q),
            nope_dim,
            std::nullopt};
        const auto project = kernel == Kernel::metal ? metal_attention_project
                                                     : attention_project;
        return project(x, p, cosines, sines, false, on(kernel, stream));
      },
      "x"_a,
      "cos"_a,
      "sin"_a,
      "input_norm"_a,
      "q_a"_a,
      "q_a_norm"_a,
      "q_b"_a,
      "kv_a"_a,
      "kv_a_norm"_a,
      "embed_q"_a,
      "nope_dim"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "full_attention_project",
      [](const mx::array& x,
         const mx::array& cosines,
         const mx::array& sines,
         const NormTuple& input_norm,
         const WeightTuple& q_a,
         const NormTuple& q_a_norm,
         const WeightTuple& q_b,
         const WeightTuple& kv_a,
         const NormTuple& kv_a_norm,
         const WeightTuple& embed_q,
         int nope_dim,
         const WeightTuple& wk,
         const NormTuple& k_norm,
         const mx::array& k_norm_bias,
         const WeightTuple& wq_b,
         const WeightTuple& weights_proj,
         int heads,
         bool interleaved,
         bool score,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const AttentionProjections p{
            norm(input_norm),
            weight(q_a),
            norm(q_a_norm),
            weight(q_b),
            weight(kv_a),
            norm(kv_a_norm),
            weight(embed_q),
            nope_dim,
            IndexerProjections{
                weight(wk),
                norm(k_norm),
                k_norm_bias,
                weight(wq_b),
                weight(weights_proj),
                heads,
                interleaved}};
        const auto project = kernel == Kernel::metal ? metal_attention_project
                                                     : attention_project;
        return project(x, p, cosines, sines, score, on(kernel, stream));
      },
      "x"_a,
      "cos"_a,
      "sin"_a,
      "input_norm"_a,
      "q_a"_a,
      "q_a_norm"_a,
      "q_b"_a,
      "kv_a"_a,
      "kv_a_norm"_a,
      "embed_q"_a,
      "nope_dim"_a,
      "wk"_a,
      "k_norm"_a,
      "k_norm_bias"_a,
      "wq_b"_a,
      "weights_proj"_a,
      "heads"_a,
      "interleaved"_a,
      "score"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "attention_output",
      [](const mx::array& x,
         const mx::array& attended,
         const WeightTuple& unembed_out,
         const WeightTuple& o_proj,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto output =
            kernel == Kernel::metal ? metal_attention_output : attention_output;
        return output(
            x,
            attended,
            weight(unembed_out),
            weight(o_proj),
            on(kernel, stream));
      },
      "x"_a,
      "attended"_a,
      "unembed_out"_a,
      "o_proj"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "metal_attend",
      [](const mx::array& x,
         const mx::array& q,
         const mx::array& latents,
         const std::optional<mx::array>& ropes,
         const std::optional<mx::array>& selected,
         const WeightTuple& unembed_out,
         const WeightTuple& o_proj,
         int rank,
         float scale,
         const std::optional<mx::array>& start,
         const mx::StreamOrDevice& stream) {
        return metal_attend(
            x,
            q,
            latents,
            ropes,
            selected,
            weight(unembed_out),
            weight(o_proj),
            rank,
            scale,
            start,
            on(Kernel::metal, stream));
      },
      "x"_a,
      "q"_a,
      "latents"_a,
      "ropes"_a.none(),
      "selected"_a.none(),
      "unembed_out"_a,
      "o_proj"_a,
      "rank"_a,
      "scale"_a,
      "start"_a.none(),
      "stream"_a.none());
  m.def(
      "mlp_block",
      [](const mx::array& x,
         const NormTuple& input_norm,
         const MlpTuple& weights,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto block =
            kernel == Kernel::metal ? metal_mlp_block : mlp_block;
        return block(x, norm(input_norm), mlp(weights), on(kernel, stream));
      },
      "x"_a,
      "input_norm"_a,
      "weights"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "moe_block",
      [](const mx::array& x,
         const NormTuple& input_norm,
         const mx::array& router_weight,
         const mx::array& correction_bias,
         int top_k,
         int n_group,
         int topk_group,
         bool norm_topk_prob,
         float routed_scaling_factor,
         const MlpTuple& experts,
         const std::optional<MlpTuple>& shared,
         const slots::UseHandle* use,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const Router router{
            router_weight,
            correction_bias,
            {top_k,
             n_group,
             topk_group,
             norm_topk_prob,
             routed_scaling_factor}};
        if (use) {
          return use->value->release(metal_streamed_moe(
              x,
              norm(input_norm),
              router,
              mlp(experts),
              shared ? std::optional(mlp(*shared)) : std::nullopt,
              use->value->use(),
              use->value->last(),
              on(kernel, stream)));
        }
        const auto block =
            kernel == Kernel::metal ? metal_moe_block : moe_block;
        return block(
            x,
            norm(input_norm),
            router,
            mlp(experts),
            shared ? std::optional(mlp(*shared)) : std::nullopt,
            on(kernel, stream));
      },
      "x"_a,
      "input_norm"_a,
      "router_weight"_a,
      "correction_bias"_a,
      "top_k"_a,
      "n_group"_a,
      "topk_group"_a,
      "norm_topk_prob"_a,
      "routed_scaling_factor"_a,
      "experts"_a,
      "shared"_a.none(),
      "use"_a.none(),
      "kernel"_a,
      "stream"_a.none());
}

}  // namespace glm_fused
