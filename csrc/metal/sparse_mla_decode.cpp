#include <algorithm>

#include "attention.h"
#include "cache_primitives.h"
#include "metal/attend.h"
#include "metal/cached_rows.h"
#include "metal/source.h"

namespace glm_fused {

namespace {

constexpr int kHeads = 16;  // a threadgroup takes so many
constexpr int kSplitSimdgroups = 4;
constexpr int kCombineSimdgroups = 4;
constexpr size_t kMaxScratch = 1 << 24;  // floats of o in a step, 64 MiB

}  // namespace

namespace metal {

void attend(
    const mx::Stream& stream,
    const Attended& a,
    const Combine& combine) {
  Encoder encoder(stream);
  const mx::array& q = a.q;
  const int tokens = q.shape(0) * q.shape(1), heads = q.shape(2);
  const int listed = a.selected ? a.selected->shape(2) : 0;
  const int list = a.selected ? listed : a.latents.shape(1);
  const int splits = std::max((list + kSplit - 1) / kSplit, 1);
  const size_t per_token = static_cast<size_t>(splits) * heads * a.layout.rank;
  const int step =
      static_cast<int>(std::clamp<size_t>(kMaxScratch / per_token, 1, tokens));
  auto o = allocate({step, splits, heads, a.layout.rank}, mx::float32);
  auto m = allocate({step, splits, heads}, mx::float32);
  auto l = allocate({step, splits, heads}, mx::float32);
  encoder.add_temporaries({o, m, l});
  MlaParams params{
      rows_params(a.layout, a.latents, a.ropes, q.shape(1)),
      0,
      heads,
      listed,
      splits,
      a.scale};
  auto* split = encoder.kernel(
      {metal_source::sparse_mla_decode,
       "mla_split",
       {q.dtype(),
        Argument::cached_rows(a.layout, a.latents, a.ropes),
        load_unit(a.layout, a.latents, a.ropes, params.rows, q.offset())}});
  for (int first = 0; first < tokens; first += step) {
    const int count = std::min(step, tokens - first);
    params.first_token = first;
    encoder.set_compute_pipeline_state(split);
    encoder.set_input_array(q, 0);
    encoder.set_input_array(a.latents, 1);
    encoder.set_input_array(a.ropes ? *a.ropes : a.latents, 2);
    encoder.set_input_array(a.selected ? *a.selected : a.start, 3);
    encoder.set_input_array(a.start, 4);
    encoder.set_output_array(o, 5);
    encoder.set_output_array(m, 6);
    encoder.set_output_array(l, 7);
    encoder.set_bytes(params, 8);
    encoder.dispatch_threadgroups(
        MTL::Size(splits, (heads + kHeads - 1) / kHeads, count),
        MTL::Size(32, kSplitSimdgroups, 1));
    combine(o, m, l, params, count);
  }
}

}  // namespace metal

void SparseMlaDecode::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  auto& y = outputs[0];
  metal::allocate(y);
  if (y.size() == 0) {
    return;
  }
  const metal::Attended attended{
      inputs[0],
      inputs[1],
      inputs[2],
      ropes_ ? &inputs[3] : nullptr,
      selected_ ? &inputs.back() : nullptr,
      layout_,
      scale_};
  if (prompt_) {
    metal::attend_prompt(stream(), attended, y);
    return;
  }
  metal::Encoder encoder(stream());
  auto* kernel =
      encoder.kernel({metal_source::sparse_mla_decode, "mla_combine"});
  const auto combine = [&](const mx::array& o,
                           const mx::array& m,
                           const mx::array& l,
                           const MlaParams& params,
                           int tokens) {
    encoder.set_compute_pipeline_state(kernel);
    encoder.set_input_array(o, 0);
    encoder.set_input_array(m, 1);
    encoder.set_input_array(l, 2);
    encoder.set_output_array(y, 3);
    encoder.set_bytes(params, 4);
    encoder.set_threadgroup_memory_length(
        metal::threadgroup_bytes(params.splits), 0);
    encoder.dispatch_threadgroups(
        MTL::Size(params.heads, tokens, 1),
        MTL::Size(32, kCombineSimdgroups, 1));
  };
  metal::attend(stream(), attended, combine);
}

}  // namespace glm_fused
