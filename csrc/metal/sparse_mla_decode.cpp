#include <algorithm>

#include "attention.h"
#include "metal/cached_rows.h"
#include "metal/source.h"
#include "primitives.h"

namespace glm_fused {

namespace {

constexpr int kHeads = 64;  // a threadgroup takes so many
constexpr int kSplitSimdgroups = 8;
constexpr int kCombineSimdgroups = 4;
constexpr size_t kMaxScratch = 1 << 24;  // floats of o in a step, 64 MiB

}  // namespace

void SparseMlaDecode::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto &q = inputs[0], &start = inputs[1], &latents = inputs[2];
  const mx::array* ropes = ropes_ ? &inputs[3] : nullptr;
  const mx::array* selected = selected_ ? &inputs.back() : nullptr;
  auto& y = outputs[0];
  y.set_data(mx::allocator::malloc(y.nbytes()));
  if (y.size() == 0) {
    return;
  }
  auto& device = mx::metal::device(stream().device);
  auto& encoder = mx::metal::get_command_encoder(stream());
  const int tokens = q.shape(0) * q.shape(1), heads = q.shape(2);
  const int listed = selected ? selected->shape(2) : 0;
  const int list = selected ? listed : latents.shape(1);
  const int splits = std::max((list + kSplit - 1) / kSplit, 1);
  const size_t per_token = static_cast<size_t>(splits) * heads * layout_.rank;
  const int step =
      static_cast<int>(std::clamp<size_t>(kMaxScratch / per_token, 1, tokens));
  auto o = metal::allocate({step, splits, heads, layout_.rank}, mx::float32);
  auto m = metal::allocate({step, splits, heads}, mx::float32);
  auto l = metal::allocate({step, splits, heads}, mx::float32);
  encoder.add_temporaries({o, m, l});
  auto split = metal::kernel(
      device,
      metal_source::sparse_mla_decode,
      "mla_split<" + metal::type_name(q.dtype()) + ", " +
          metal::rows_name(layout_, latents, ropes) + ">");
  auto combine =
      metal::kernel(device, metal_source::sparse_mla_decode, "mla_combine");
  MlaParams params{
      metal::rows_params(layout_, latents, ropes, q.shape(1)),
      0,
      heads,
      listed,
      splits,
      scale_};
  for (int first = 0; first < tokens; first += step) {
    const int count = std::min(step, tokens - first);
    params.first_token = first;
    encoder.set_compute_pipeline_state(split);
    encoder.set_input_array(q, 0);
    encoder.set_input_array(latents, 1);
    encoder.set_input_array(ropes ? *ropes : latents, 2);
    encoder.set_input_array(selected ? *selected : start, 3);
    encoder.set_input_array(start, 4);
    encoder.set_output_array(o, 5);
    encoder.set_output_array(m, 6);
    encoder.set_output_array(l, 7);
    encoder.set_bytes(params, 8);
    encoder.dispatch_threadgroups(
        MTL::Size(splits, (heads + kHeads - 1) / kHeads, count),
        MTL::Size(32, kSplitSimdgroups, 1));
    encoder.set_compute_pipeline_state(combine);
    encoder.set_input_array(o, 0);
    encoder.set_input_array(m, 1);
    encoder.set_input_array(l, 2);
    encoder.set_output_array(y, 3);
    encoder.set_bytes(params, 4);
    encoder.set_threadgroup_memory_length(metal::threadgroup_bytes(splits), 0);
    encoder.dispatch_threadgroups(
        MTL::Size(heads, count, 1),
        MTL::Size(32, metal::simdgroups(combine, kCombineSimdgroups), 1));
  }
}

}  // namespace glm_fused
