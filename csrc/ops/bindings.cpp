#include "ops/bindings.h"

#include "binding_types.h"
#include "slots/bindings.h"

namespace glm_fused {

using namespace nb::literals;

void bind_ops(nb::module_& m) {
  m.def(
      "probe",
      [](const mx::array& a) { return a; },
      "a"_a,
      "Return `a`: fails where this build and the installed mlx disagree.");
  m.def(
      "check_tokens",
      [](const mx::array& tokens, int vocabulary) {
        return check_tokens(tokens, vocabulary, mx::Device::cpu);
      },
      "tokens"_a,
      "vocabulary"_a,
      "`tokens` [b, l]; raises where one is outside the vocabulary, now or "
      "when they are evaluated.");
  m.def(
      "embed",
      [](const mx::array& tokens, const WeightTuple& table, int hidden) {
        return embed(tokens, weight(table), hidden, mx::Device::cpu);
      },
      "tokens"_a,
      "table"_a,
      "hidden"_a);
  m.def(
      "gguf_values",
      [](const WeightTuple& w) { return gguf_values(weight(w)); },
      "w"_a,
      "The values float32 [..., n, k] of a weight in one of GGUF's formats.");
  m.def(
      "quantized_matvec",
      [](const mx::array& x,
         const WeightTuple& w,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return quantized_matvec(
            x, weight(w), is_reference(kernel), on(kernel, stream));
      },
      "x"_a,
      "w"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "moe_decode",
      [](const mx::array& x,
         const WeightTuple& gate,
         const WeightTuple& up,
         const WeightTuple& down,
         const mx::array& slots,
         const mx::array& scores,
         const slots::UseHandle* use,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return moe_decode(
            x,
            weight(gate),
            weight(up),
            weight(down),
            slots,
            scores,
            is_reference(kernel),
            kernel == Kernel::metal_prompt,
            use ? use->value->use() : nullptr,
            on(kernel, stream));
      },
      "x"_a,
      "gate"_a,
      "up"_a,
      "down"_a,
      "slots"_a,
      "scores"_a,
      "use"_a.none(),
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "expert_matvec",
      [](const mx::array& x,
         const WeightTuple& w,
         const mx::array& slots,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return expert_matvec(
            x, weight(w), slots, is_reference(kernel), on(kernel, stream));
      },
      "x"_a,
      "w"_a,
      "slots"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "swiglu",
      [](const mx::array& gate,
         const mx::array& up,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return swiglu(gate, up, on(kernel, stream));
      },
      "gate"_a,
      "up"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "expert_sum",
      [](const mx::array& y,
         const mx::array& scores,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return expert_sum(y, scores, on(kernel, stream));
      },
      "y"_a,
      "scores"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "rms_norm",
      [](const mx::array& x,
         const mx::array& weight,
         float eps,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return rms_norm(
            x, weight, eps, is_reference(kernel), on(kernel, stream));
      },
      "x"_a,
      "weight"_a,
      "eps"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "layer_norm",
      [](const mx::array& x,
         const mx::array& weight,
         const mx::array& bias,
         float eps,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return layer_norm(
            x, weight, bias, eps, is_reference(kernel), on(kernel, stream));
      },
      "x"_a,
      "weight"_a,
      "bias"_a,
      "eps"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "rotate",
      [](const mx::array& x,
         const mx::array& cosines,
         const mx::array& sines,
         bool interleaved,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return rotate(
            x,
            cosines,
            sines,
            interleaved,
            is_reference(kernel),
            on(kernel, stream));
      },
      "x"_a,
      "cosines"_a,
      "sines"_a,
      "interleaved"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "router_topk",
      [](const mx::array& x,
         const mx::array& weight,
         const mx::array& correction_bias,
         int top_k,
         int n_group,
         int topk_group,
         bool norm_topk_prob,
         float routed_scaling_factor,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return router_topk(
            x,
            weight,
            correction_bias,
            {top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor},
            is_reference(kernel),
            on(kernel, stream));
      },
      "x"_a,
      "weight"_a,
      "correction_bias"_a,
      "top_k"_a,
      "n_group"_a,
      "topk_group"_a,
      "norm_topk_prob"_a,
      "routed_scaling_factor"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "cache_buffer",
      [](int batch, int capacity, int width, mx::Dtype dtype) {
        return cache_buffer(batch, capacity, width, dtype);
      },
      "batch"_a,
      "capacity"_a,
      "width"_a,
      "dtype"_a,
      "Zeros [batch, 1, capacity, width] for a cache that the default device, "
      "a CPU, is\nto read, in huge pages where the system lets.");
  m.def(
      "append_rows",
      [](mx::array& buffer,
         const mx::array& rows,
         int at,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto [whole, first] =
            append_rows(buffer, rows, at, on(kernel, stream));
        buffer.overwrite_descriptor(whole);
        return first;
      },
      "buffer"_a,
      "rows"_a,
      "at"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "append_pair",
      [](mx::array& buffer,
         const mx::array& rows,
         mx::array& other_buffer,
         const mx::array& other_rows,
         int at,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto made = append_pair(
            buffer, rows, other_buffer, other_rows, at, on(kernel, stream));
        buffer.overwrite_descriptor(made[0]);
        other_buffer.overwrite_descriptor(made[1]);
        return std::pair(made[2], made[3]);
      },
      "buffer"_a,
      "rows"_a,
      "other_buffer"_a,
      "other_rows"_a,
      "at"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "append_packed",
      [](mx::array& buffer,
         const mx::array& values,
         const std::optional<mx::array>& ropes,
         int at,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        const auto [whole, first] =
            append_packed(buffer, values, ropes, at, on(kernel, stream));
        buffer.overwrite_descriptor(whole);
        return first;
      },
      "buffer"_a,
      "values"_a,
      "ropes"_a.none(),
      "at"_a,
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "indexer_topk",
      [](const mx::array& q,
         const mx::array& keys,
         const mx::array& weights,
         int k,
         float scale,
         float weight_scale,
         const std::optional<mx::array>& start,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return indexer_topk(
            q,
            keys,
            weights,
            k,
            scale,
            weight_scale,
            start,
            is_reference(kernel),
            kernel == Kernel::metal_prompt,
            on(kernel, stream));
      },
      "q"_a,
      "keys"_a,
      "weights"_a,
      "k"_a,
      "scale"_a,
      "weight_scale"_a,
      "start"_a.none(),
      "kernel"_a,
      "stream"_a.none());
  m.def(
      "sparse_mla_decode",
      [](const mx::array& q,
         const mx::array& latents,
         const std::optional<mx::array>& ropes,
         const std::optional<mx::array>& selected,
         int rank,
         float scale,
         const std::optional<mx::array>& start,
         Kernel kernel,
         const mx::StreamOrDevice& stream) {
        return sparse_mla_decode(
            q,
            latents,
            ropes,
            selected,
            rank,
            scale,
            start,
            is_reference(kernel),
            kernel == Kernel::metal_prompt,
            on(kernel, stream));
      },
      "q"_a,
      "latents"_a,
      "ropes"_a.none(),
      "selected"_a.none(),
      "rank"_a,
      "scale"_a,
      "start"_a.none(),
      "kernel"_a,
      "stream"_a.none());
}

}  // namespace glm_fused
