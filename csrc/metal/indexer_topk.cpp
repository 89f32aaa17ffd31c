#include <algorithm>

#include "metal/cached_rows.h"
#include "metal/source.h"
#include "primitives.h"

namespace glm_fused {

namespace {

constexpr int kScoreKeys = 256;  // a threadgroup scores so many
constexpr int kScoreSimdgroups = 4;
constexpr int kSelectSimdgroups = 32;
// This many scores are held at once, 64 MiB.
constexpr int kMaxScores = 1 << 24;

}  // namespace

void IndexerTopk::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto &q = inputs[0], &keys = inputs[1], &weights = inputs[2];
  const auto& start = inputs[3];
  auto& selected = outputs[0];
  selected.set_data(mx::allocator::malloc(selected.nbytes()));
  if (selected.size() == 0) {
    return;
  }
  metal::Encoder encoder(stream());
  auto* score = encoder.kernel(
      {metal_source::indexer_topk,
       "index_scores",
       {q.dtype(), metal::Argument::cached_rows(layout_, keys, nullptr)}});
  auto* select = encoder.kernel({metal_source::indexer_topk, "index_select"});
  const int columns = keys.shape(1), queries = q.shape(1);
  const int step = std::clamp(kMaxScores / columns, 1, queries);
  auto words = metal::allocate({step, columns}, mx::uint32);
  encoder.add_temporary(words);
  IndexParams params{
      metal::rows_params(layout_, keys, nullptr, queries),
      0,
      0,
      q.shape(2),
      selected.shape(2),
      scale_,
      weight_scale_};
  for (params.b = 0; params.b < q.shape(0); params.b++) {
    for (int first = 0; first < queries; first += step) {
      const int count = std::min(step, queries - first);
      params.first_query = first;
      encoder.set_compute_pipeline_state(score);
      encoder.set_input_array(q, 0);
      encoder.set_input_array(weights, 1);
      encoder.set_input_array(keys, 2);
      encoder.set_input_array(start, 3);
      encoder.set_output_array(words, 4);
      encoder.set_bytes(params, 5);
      encoder.dispatch_threadgroups(
          MTL::Size((columns + kScoreKeys - 1) / kScoreKeys, count, 1),
          MTL::Size(32, kScoreSimdgroups, 1));
      encoder.set_compute_pipeline_state(select);
      encoder.set_input_array(words, 0);
      encoder.set_input_array(start, 1);
      encoder.set_output_array(selected, 2);
      encoder.set_bytes(params, 3);
      encoder.dispatch_threadgroups(
          MTL::Size(count, 1, 1),
          MTL::Size(32, metal::simdgroups(select, kSelectSimdgroups), 1));
    }
  }
}

}  // namespace glm_fused
