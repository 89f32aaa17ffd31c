#include <algorithm>

#include "cache_primitives.h"
#include "metal/cached_rows.h"
#include "metal/limits.h"
#include "metal/source.h"

namespace glm_fused {

namespace {

// As metal/index_digits.h has them.
constexpr int kScoreKeys = 256;  // a threadgroup scores so many
constexpr int kScoreSimdgroups = 4;
constexpr int kListWords = 65;

// As metal/index_prompt.h has them.
constexpr int kTileKeys = 128;
constexpr int kTileQueries = 32;
constexpr int kTileSimdgroups = 8;
constexpr int kMostDims = 128;

constexpr int kSelectSimdgroups = 32;
// A threadgroup selects among so many words alone; of more it takes so many,
// and what it keeps is selected from.
constexpr int kAlone = 1 << 15;
constexpr int kStretch = 1 << 14;
// This many words, of all queries together, are held at once: 64 MiB.
constexpr int64_t kMaxWords = 1 << 24;

int whole(int count, int size) {
  return metal::blocks(count, size) * size;
}

// How many words of a query are held.
struct WordCounts {
  WordCounts(int keys, int top_k)
      : columns(whole(keys, kScoreKeys)),
        lists(columns / kScoreKeys * kScoreSimdgroups * kListWords),
        stretch(std::max(kStretch, whole(4 * top_k, kScoreKeys))) {
    int count = columns;
    while (count > std::max(kAlone, stretch)) {
      count = metal::blocks(count, stretch) * top_k;
      kept.push_back(count);
    }
  }

  int64_t all() const {
    int64_t words = columns + lists;
    for (const int count : kept) {
      words += 2 * whole(count, 4);
    }
    return words;
  }

  // Gives how many of the queries are taken at once: all, or whole tiles.
  int at_once(int queries) const {
    const int64_t most = std::max<int64_t>(kMaxWords / all(), 1);
    return most < queries && most > kTileQueries
        ? most / kTileQueries * kTileQueries
        : std::min<int64_t>(most, queries);
  }

  int columns;            // of keys
  int lists;              // of the keys' first digits
  int stretch;            // of the words that a threadgroup selects from
  std::vector<int> kept;  // by each launch of the selection but the last
};

// Words of the queries that are taken at once, with keys to match if a launch
// of the selection kept them, else with the lists of their digits.
struct Words {
  mx::array words, source;
  int columns;  // from query to query
  int count;    // of a query
};

Words words_of(metal::Encoder& encoder, int queries, int words, int sources) {
  const auto temporary = [&](int columns) {
    auto made = metal::allocate({queries, columns}, mx::uint32);
    encoder.add_temporary(made);
    return made;
  };
  return {temporary(words), temporary(sources), words, words};
}

// The selections of a sequence's queries, some at a time.
class Indexing {
 public:
  Indexing(
      metal::Encoder& encoder,
      const mx::array& start,
      mx::array& selected,
      const WordCounts& counts,
      int queries)
      : encoder_(encoder),
        start_(start),
        selected_(selected),
        stretch_(counts.stretch) {
    levels_.push_back(words_of(encoder, queries, counts.columns, counts.lists));
    for (const int count : counts.kept) {
      const int columns = whole(count, 4);
      levels_.push_back(words_of(encoder, queries, columns, columns));
      levels_.back().count = count;
    }
  }

  // The words of all keys.
  Words& all() {
    return levels_.front();
  }

  // Selects among the words of all keys.
  void select(const IndexParams& params) {
    const size_t last = levels_.size() - 1;
    for (size_t i = 0; i < last; i++) {
      launch(params, i, stretch_, levels_[i + 1].source, &levels_[i + 1]);
    }
    launch(params, last, levels_[last].count, selected_, nullptr);
  }

 private:
  // A threadgroup takes each stretch of a level's words. What is `kept` of them
  // are keys, and, but by the last launch, words.
  void launch(
      const IndexParams& index,
      size_t level,
      int stretch,
      mx::array& kept,
      Words* to) {
    const Words& from = levels_[level];
    const SelectParams params{
        index, from.columns, from.count, stretch, to ? to->columns : 0};
    auto* kernel = encoder_.kernel(
        {metal_source::indexer_topk,
         "index_select",
         {level == 0, to == nullptr}});
    encoder_.set_compute_pipeline_state(kernel);
    encoder_.set_input_array(from.words, 0);
    encoder_.set_input_array(start_, 1);
    encoder_.set_output_array(kept, 2);
    encoder_.set_bytes(params, 3);
    encoder_.set_input_array(from.source, 4);
    if (to) {
      encoder_.set_output_array(to->words, 5);
    } else {
      encoder_.set_input_array(from.words, 5);  // never touched
    }
    encoder_.dispatch_threadgroups(
        MTL::Size(index.count, metal::blocks(params.count, stretch), 1),
        MTL::Size(32, metal::simdgroups(kernel, kSelectSimdgroups), 1));
  }

  metal::Encoder& encoder_;
  const mx::array& start_;
  mx::array& selected_;
  int stretch_;
  std::vector<Words> levels_;  // the first are those of all keys
};

}  // namespace

namespace metal {

bool index_prompt_takes(int dim) {
  return dim <= kMostDims;
}

size_t index_scratch_bytes(int queries, int keys, int top_k) {
  const WordCounts counts(std::max(keys, 1), top_k);
  return 4 * counts.all() * counts.at_once(queries);
}

}  // namespace metal

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
  const int queries = q.shape(1), top_k = selected.shape(2);
  const WordCounts counts(keys.shape(1), top_k);
  const int step = counts.at_once(queries);
  Indexing indexing(encoder, start, selected, counts, step);
  IndexParams params{
      metal::rows_params(layout_, keys, nullptr, queries),
      0,
      0,
      0,
      q.shape(2),
      top_k,
      counts.columns,
      scale_,
      weight_scale_};
  const uint64_t first_q = prompt_ ? q.offset() : 0;
  auto* score = encoder.kernel(
      {prompt_ ? metal_source::index_prompt : metal_source::indexer_topk,
       prompt_ ? "index_prompt" : "index_scores",
       {q.dtype(),
        metal::Argument::cached_rows(layout_, keys, nullptr),
        metal::load_unit(layout_, keys, nullptr, params.rows, first_q)}});
  for (params.b = 0; params.b < q.shape(0); params.b++) {
    for (int first = 0; first < queries; first += step) {
      params.first_query = first;
      params.count = std::min(step, queries - first);
      encoder.set_compute_pipeline_state(score);
      encoder.set_input_array(q, 0);
      encoder.set_input_array(weights, 1);
      encoder.set_input_array(keys, 2);
      encoder.set_input_array(start, 3);
      encoder.set_output_array(indexing.all().words, 4);
      encoder.set_bytes(params, 5);
      encoder.set_output_array(indexing.all().source, 6);
      if (prompt_) {
        encoder.dispatch_threadgroups(
            MTL::Size(
                counts.columns / kTileKeys,
                metal::blocks(params.count, kTileQueries),
                1),
            MTL::Size(32, kTileSimdgroups, 1));
      } else {
        encoder.dispatch_threadgroups(
            MTL::Size(counts.columns / kScoreKeys, params.count, 1),
            MTL::Size(32, kScoreSimdgroups, 1));
      }
      indexing.select(params);
    }
  }
}

}  // namespace glm_fused
