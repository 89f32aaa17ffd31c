// The indexer's scores, compiled once per instruction set.
#pragma once

#include <algorithm>

#include "cpu/attention/attention_kernels.h"
#include "cpu/attention/attention_rows.h"

namespace {

using namespace glm_fused;
using namespace glm_fused::cpu;

#if defined(GLM_AVX512)
constexpr int kKeyVectors = 2, kHeads = 8;  // vectors by heads in registers
#else
constexpr int kKeyVectors = 1, kHeads = 4;
#endif
constexpr int kKeys = kKeyVectors * kHalf;
constexpr int kDepth = 64;   // columns of keys are transposed at a time
constexpr int kQueries = 8;  // queries share the transposed keys

int round_up(int n, int unit) {
  return (n + unit - 1) / unit * unit;
}

size_t index_packed(int heads, int dim) {
  return static_cast<size_t>(round_up(heads, kHeads)) * dim;
}

// Packs q [heads, dim] as [block of kDepth][head group][dim][kHeads], with
// zeros for the heads that are not there.
void index_pack(const float* q, int heads, int dim, float* packed) {
  for (int first = 0; first < dim; first += kDepth) {
    for (int group = 0; group < heads; group += kHeads) {
      for (int d = first; d < std::min(first + kDepth, dim); d++) {
        for (int h = group; h < group + kHeads; h++) {
          *packed++ = h < heads ? q[static_cast<size_t>(h) * dim + d] : 0.0f;
        }
      }
    }
  }
}

// A tile of keys and what comes from memory while it is scored.
struct IndexTile {
  int begin, end;  // the tile's keys
  const uint8_t* next;
  size_t share;  // so many bytes are fetched with each group of heads

  void fetch() {
    prefetch(next, share);
    next += share;
  }
};

// Stores columns [first, first + depth) transposed, at to[d * kKeys + key].
void load_keys(
    const IndexArgs& a,
    const IndexTile& tile,
    int first,
    int depth,
    float* to) {
  for (int i = 0; i < kKeys; i += kHalf) {
    const int key = tile.begin + i;
    const int count = std::clamp(tile.end - key, 0, kHalf);
    load_transposed<kKeys>(a.keys, key, count, first, depth, to + i);
  }
}

// Adds the sum over d of q[d][head] keys[d][key] to dots[head][key], for kHeads
// heads. Dots that are `fresh` begin at zero.
GLM_INLINE void multiply_keys(
    const float* q,
    const float* keys,
    int depth,
    bool fresh,
    float* dots) {
  F16 sum[kHeads * kKeyVectors];
  unroll_each<kHeads * kKeyVectors>(
      GLM_EACH(i) { sum[i] = fresh ? zero() : load(dots + i * kHalf); });
  for (int d = 0; d < depth; d++) {
    F16 key[kKeyVectors];
    unroll_each<kKeyVectors>(
        GLM_EACH(v) { key[v] = load(keys + d * kKeys + v * kHalf); });
    unroll_each<kHeads>(GLM_EACH(h) {
      const F16 query = splat(q[d * kHeads + h]);
      unroll_each<kKeyVectors>(GLM_EACH(v) {
        F16& to = sum[h * kKeyVectors + v];
        to = fma(query, key[v], to);
      });
    });
  }
  unroll_each<kHeads * kKeyVectors>(
      GLM_EACH(i) { store(dots + i * kHalf, sum[i]); });
}

// Stores the chain over heads of fma(weight, relu(dot * scale), score).
void store_scores(
    const IndexArgs& a,
    const IndexTile& tile,
    int query,
    const float* dots) {
  const float* weight = a.weights + static_cast<size_t>(query) * a.heads;
  F16 score[kKeyVectors];
  unroll_each<kKeyVectors>(GLM_EACH(v) { score[v] = zero(); });
  for (int h = 0; h < a.heads; h++) {
    unroll_each<kKeyVectors>(GLM_EACH(v) {
      const F16 dot = load(dots + h * kKeys + v * kHalf);
      score[v] =
          fma(splat(weight[h]), relu(mul(dot, splat(a.scale))), score[v]);
    });
  }
  uint32_t words[kKeys];
  unroll_each<kKeyVectors>(
      GLM_EACH(v) { store_words(words + v * kHalf, ordered(score[v])); });
  uint32_t* to = a.scores + query * a.stride + tile.begin;
  std::copy_n(words, tile.end - tile.begin, to);
}

// Scores a tile for queries [first, last). `keys` and a query's share of the
// rest stay in L1.
void score_tile(
    const IndexArgs& a,
    IndexTile tile,
    int first,
    int last,
    float* keys,
    float* dots) {
  const int heads = round_up(a.heads, kHeads);
  const size_t size = static_cast<size_t>(heads) * kKeys;
  const auto sees = [&](int i) {
    return tile.end > a.low[i] && tile.begin < a.high[i];
  };
  for (int d = 0; d < a.dim; d += kDepth) {
    const int depth = std::min(kDepth, a.dim - d);
    load_keys(a, tile, d, depth, keys);
    for (int i = first; i < last; i++) {
      const float* q = a.q + i * index_packed(a.heads, a.dim) +
          static_cast<size_t>(d) * heads;
      float* to = dots + (i - first) * size;
      for (int h = 0; sees(i) && h < heads; h += kHeads) {
        tile.fetch();
        multiply_keys(q + h * depth, keys, depth, d == 0, to + h * kKeys);
      }
    }
  }
  for (int i = first; i < last; i++) {
    if (sees(i)) {
      store_scores(a, tile, i, dots + (i - first) * size);
    }
  }
}

size_t index_spare(int queries, int heads) {
  const int rows = std::min(queries, kQueries) * round_up(heads, kHeads);
  return static_cast<size_t>(kDepth + rows) * kKeys;
}

void index_scores(const IndexArgs& a) {
  const int heads = round_up(a.heads, kHeads);
  const int shares = heads / kHeads * ((a.dim + kDepth - 1) / kDepth);
  float *keys = a.spare, *dots = a.spare + kDepth * kKeys;
  for (int begin = a.begin; begin < a.end; begin += kKeys) {
    const int end = std::min(begin + kKeys, a.end);
    // For a single query the next keys are fetched while these are scored, also
    // those of the next task, which is mostly this thread's.
    const int more = a.queries == 1 ? std::min(kKeys, a.count - end) : 0;
    const uint8_t* next = a.keys.latents + end * a.keys.latent_stride;
    const IndexTile tile{
        begin, end, next, more * a.keys.latent_stride / shares};
    for (int i = 0; i < a.queries; i += kQueries) {
      const int last = std::min(i + kQueries, a.queries);
      score_tile(a, tile, i, last, keys, dots);
    }
  }
}

}  // namespace
