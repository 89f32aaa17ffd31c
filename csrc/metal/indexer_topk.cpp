#include <algorithm>

#include "metal/cached_rows.h"
#include "metal/source.h"
#include "primitives.h"

namespace glm_fused {

namespace {

// As metal/index_digits.h has them.
constexpr int kScoreKeys = 256;  // a threadgroup scores so many
constexpr int kScoreSimdgroups = 4;
constexpr int kListWords = 65;

constexpr int kSelectSimdgroups = 32;
// A threadgroup selects among so many words alone; of more it takes so many,
// and what it keeps is selected from.
constexpr int kAlone = 1 << 15;
constexpr int kStretch = 1 << 14;
// This many words, of scores and their lists, are held at once: 64 MiB.
constexpr int kMaxWords = 1 << 24;

int whole(int count, int size) {
  return metal::blocks(count, size) * size;
}

// Words of a query, with keys to match if a launch of the selection kept them.
struct Words {
  mx::array words, source;
  int columns;  // from query to query
  int count;
};

// One dispatch: some queries of a sequence.
class Indexing {
 public:
  Indexing(
      metal::Encoder& encoder,
      const mx::array& start,
      mx::array& selected,
      int queries)
      : encoder_(encoder),
        start_(start),
        selected_(selected),
        queries_(queries) {}

  // Selects among the words of all keys, whose digits are listed.
  void select(const IndexParams& params, const Words& all) {
    const int stretch = std::max(kStretch, whole(4 * params.top_k, kScoreKeys));
    Words from = all;
    bool first = true;
    while (from.count > std::max(kAlone, stretch)) {
      const int groups = metal::blocks(from.count, stretch);
      const int count = groups * params.top_k, columns = whole(count, 4);
      Words kept{temporary(columns), temporary(columns), columns, count};
      launch(
          {params, from.columns, from.count, stretch, columns},
          from,
          first,
          kept.source,
          &kept.words);
      from = kept;
      first = false;
    }
    launch(
        {params, from.columns, from.count, from.count, 0},
        from,
        first,
        selected_,
        nullptr);
  }

  mx::array temporary(int columns) {
    auto made = metal::allocate({queries_, columns}, mx::uint32);
    encoder_.add_temporary(made);
    return made;
  }

 private:
  // A threadgroup takes each stretch; `words` are not kept of the last launch.
  void launch(
      const SelectParams& params,
      const Words& from,
      bool first,
      mx::array& kept,
      mx::array* words) {
    auto* kernel = encoder_.kernel(
        {metal_source::indexer_topk,
         "index_select",
         {first, words == nullptr}});
    encoder_.set_compute_pipeline_state(kernel);
    encoder_.set_input_array(from.words, 0);
    encoder_.set_input_array(start_, 1);
    encoder_.set_output_array(kept, 2);
    encoder_.set_bytes(params, 3);
    encoder_.set_input_array(from.source, 4);
    if (words) {
      encoder_.set_output_array(*words, 5);
    } else {
      encoder_.set_input_array(from.words, 5);  // never touched
    }
    encoder_.dispatch_threadgroups(
        MTL::Size(queries_, metal::blocks(params.count, params.stretch), 1),
        MTL::Size(32, metal::simdgroups(kernel, kSelectSimdgroups), 1));
  }

  metal::Encoder& encoder_;
  const mx::array& start_;
  mx::array& selected_;
  int queries_;
};

}  // namespace

void IndexerTopk::eval_gpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto &q = inputs[0], &keys = inputs[1], &weights = inputs[2];
  const auto& start = inputs[3];
  auto& selected = outputs[0];
  metal::allocate(selected);
  if (selected.size() == 0) {
    return;
  }
  metal::Encoder encoder(stream());
  const int queries = q.shape(1);
  const int columns = whole(keys.shape(1), kScoreKeys);
  const int lists = columns / kScoreKeys * kScoreSimdgroups * kListWords;
  const int step = std::clamp(kMaxWords / (columns + lists), 1, queries);
  IndexParams params{
      metal::rows_params(layout_, keys, nullptr, queries),
      0,
      0,
      q.shape(2),
      selected.shape(2),
      columns,
      scale_,
      weight_scale_};
  auto* score = encoder.kernel(
      {metal_source::indexer_topk,
       "index_scores",
       {q.dtype(),
        metal::Argument::cached_rows(layout_, keys, nullptr),
        metal::load_unit(layout_, keys, nullptr, params.rows)}});
  for (params.b = 0; params.b < q.shape(0); params.b++) {
    for (int first = 0; first < queries; first += step) {
      const int count = std::min(step, queries - first);
      Indexing indexing(encoder, start, selected, count);
      Words words{
          indexing.temporary(columns),
          indexing.temporary(lists),
          columns,
          columns};
      params.first_query = first;
      encoder.set_compute_pipeline_state(score);
      encoder.set_input_array(q, 0);
      encoder.set_input_array(weights, 1);
      encoder.set_input_array(keys, 2);
      encoder.set_input_array(start, 3);
      encoder.set_output_array(words.words, 4);
      encoder.set_bytes(params, 5);
      encoder.set_output_array(words.source, 6);
      encoder.dispatch_threadgroups(
          MTL::Size(columns / kScoreKeys, count, 1),
          MTL::Size(32, kScoreSimdgroups, 1));
      indexing.select(params, words);
    }
  }
}

}  // namespace glm_fused
