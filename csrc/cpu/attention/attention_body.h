// sparse_mla_decode, compiled once per instruction set, and the table of the
// long-context kernels.
#pragma once

#include <algorithm>
#include <iterator>
#include <numeric>

#include "cpu/attention/attention_kernels.h"
#include "cpu/attention/attention_rows.h"
#include "cpu/attention/attention_select.h"
#include "cpu/attention/attention_simd.h"
#include "cpu/attention/indexer_body.h"
#include "cpu/attention/row_fetch.h"

namespace {

using namespace glm_fused;
using namespace glm_fused::cpu;

#if defined(GLM_AVX512)
constexpr int kWide = 4, kDeep = 4;  // vectors by keys, or heads, in registers
#else
constexpr int kWide = 1, kDeep = 4;
#endif

// Of how many parts n are, which are taken `unit` at a time, the last ones
// alone.
int parts_of(int n, int unit) {
  return n / unit + n % unit;
}

// Adds the sum over d of q[d][lane] k[key][d] to s[key][lane], with `vectors`
// vectors of lanes by `keys` keys in registers. Sums that are `fresh` begin at
// zero.
template <int vectors, int keys>
GLM_INLINE void multiply(
    const float* q,
    int lanes,
    const float* k,
    int depth,
    bool fresh,
    float* s) {
  F16 sum[vectors * keys];
  unroll_each<vectors * keys>(GLM_EACH(i) {
    const float* from = s + i / vectors * lanes + i % vectors * kHalf;
    sum[i] = fresh ? zero() : load(from);
  });
  for (int d = 0; d < depth; d++) {
    F16 query[vectors];
    unroll_each<vectors>(
        GLM_EACH(v) { query[v] = load(q + d * lanes + v * kHalf); });
    unroll_each<keys>(GLM_EACH(j) {
      const F16 key = splat(k[j * kSplit + d]);
      unroll_each<vectors>(GLM_EACH(v) {
        F16& to = sum[j * vectors + v];
        to = fma(query[v], key, to);
      });
    });
  }
  unroll_each<vectors * keys>(GLM_EACH(i) {
    store(s + i / vectors * lanes + i % vectors * kHalf, sum[i]);
  });
}

template <int vectors>
void multiply_lanes(
    const float* q,
    int lanes,
    const float* k,
    int depth,
    int count,
    bool fresh,
    float* s,
    RowFetch& fetch) {
  int key = 0;
  for (; key + kDeep <= count; key += kDeep) {
    fetch.step();
    multiply<vectors, kDeep>(
        q, lanes, k + key * kSplit, depth, fresh, s + key * lanes);
  }
  for (; key < count; key++) {
    fetch.step();
    multiply<vectors, 1>(
        q, lanes, k + key * kSplit, depth, fresh, s + key * lanes);
  }
}

// Does the same for all lanes and keys, in a block of at most kSplit
// dimensions.
void multiply_block(
    const float* q,
    int lanes,
    const float* k,
    int depth,
    int count,
    bool fresh,
    float* s,
    RowFetch& fetch) {
  int lane = 0;
  for (; lane + kWide * kHalf <= lanes; lane += kWide * kHalf) {
    multiply_lanes<kWide>(
        q + lane, lanes, k, depth, count, fresh, s + lane, fetch);
  }
  for (; lane < lanes; lane += kHalf) {
    multiply_lanes<1>(q + lane, lanes, k, depth, count, fresh, s + lane, fetch);
  }
}

void transpose(const float* q, int width, int lanes, float* to) {
  for (int lane = 0; lane < lanes; lane += kHalf) {
    const auto* rows = reinterpret_cast<const uint8_t*>(q + lane * width);
    for (int d = 0; d < width; d += kHalf) {
      U16 columns[kHalf];
      transpose_words(rows + d * sizeof(float), width * sizeof(float), columns);
      const int count = std::min(kHalf, width - d);
      for (int i = 0; i < count; i++) {
        store(to + (d + i) * lanes + lane, as_float(columns[i]));
      }
    }
  }
}

// Turns the dot products of one vector of heads into p, and finds m and l.
void softmax_lanes(const SplitArgs& a, int lane) {
  float* p = a.p + lane;
  F16 m = splat(-__builtin_inff()), l = zero();
  for (int key = 0; key < a.count; key++) {
    const F16 s = mul(load(p + key * a.lanes), splat(a.scale));
    store(p + key * a.lanes, s);
    m = larger(s, m);
  }
  for (int key = 0; key < a.count; key++) {
    const F16 e = exp_negative(sub(load(p + key * a.lanes), m));
    store(p + key * a.lanes, e);
    l = add(l, e);
  }
  store(a.m + lane, m);
  store(a.l + lane, l);
}

// The dot products of a split with a few heads: sixteen keys are the lanes.
class FewHeads {
 public:
  explicit FewHeads(const SplitArgs& a)
      : a_(a), width_(a.rows->rank + a.rows->rope_dim) {
    for (auto& keys : sums_) {
      for (F16& sum : keys) {
        sum = zero();
      }
    }
  }

  // Does what multiply_block does with dimensions [begin, begin + depth); k has
  // rows up to a whole vector of keys.
  void add(int begin, const float* k, int depth) {
    for (int keys = 0; keys < a_.count; keys += kHalf) {
      for (int d = 0; d < depth; d += kHalf) {
        U16 columns[kHalf];
        transpose_words(
            reinterpret_cast<const uint8_t*>(k + keys * kSplit + d),
            kSplit * sizeof(float),
            columns);
        const int count = std::min(kHalf, depth - d);
        for (int h = 0; h < a_.heads; h += kDeep) {
          multiply(begin + d, h, columns, count, sums_[keys / kHalf] + h);
        }
      }
    }
  }

  void store_all() const {
    std::fill_n(a_.p, static_cast<size_t>(a_.count) * a_.lanes, 0.0f);
    for (int keys = 0; keys < a_.count; keys += kHalf) {
      const int count = std::min(kHalf, a_.count - keys);
      for (int h = 0; h < a_.heads; h++) {
        float each[kHalf];
        store(each, sums_[keys / kHalf][h]);
        for (int i = 0; i < count; i++) {
          a_.p[(keys + i) * a_.lanes + h] = each[i];
        }
      }
    }
  }

 private:
  // Adds to the sums of kDeep heads; those past the last are as it.
  void multiply(
      int begin,
      int head,
      const U16 (&columns)[kHalf],
      int count,
      F16* sums) const {
    const float* q[kDeep];
    F16 sum[kDeep];
    unroll_each<kDeep>(GLM_EACH(h) {
      q[h] = a_.q + std::min(head + h, a_.heads - 1) * width_ + begin;
      sum[h] = sums[h];
    });
    for (int i = 0; i < count; i++) {
      const F16 key = as_float(columns[i]);
      unroll_each<kDeep>(
          GLM_EACH(h) { sum[h] = fma(splat(q[h][i]), key, sum[h]); });
    }
    unroll_each<kDeep>(GLM_EACH(h) { sums[h] = sum[h]; });
  }

  const SplitArgs& a_;
  const int width_;
  F16 sums_[kSplit / kHalf][kFewHeads];
};

void split(const SplitArgs& a) {
  const Rows& rows = *a.rows;
  alignas(64) float block[kSplit * kSplit];
  const bool few = a.heads <= kFewHeads;
  const int whole = round_up(a.count, kHalf);
  std::fill(block + a.count * kSplit, block + whole * kSplit, 0.0f);
  FewHeads heads(a);
  const int blocks = round_up(rows.rank, kSplit) / kSplit +
      round_up(rows.rope_dim, kSplit) / kSplit;
  const int steps =
      few ? 1 : parts_of(a.lanes / kHalf, kWide) * parts_of(a.count, kDeep);
  RowFetch fetch(
      rows, a.keys + a.count, a.next_count, 0, rows.rank, true, blocks * steps);
  const auto part = [&](int dims, int first, auto load_part) {
    for (int d = 0; d < dims; d += kSplit) {
      const int depth = std::min(kSplit, dims - d);
      load_part({rows, a.keys, a.count, d, depth, block});
      if (few) {
        fetch.step();
        heads.add(first + d, block, depth);
      } else {
        const float* q = a.q + static_cast<size_t>(first + d) * a.lanes;
        const bool fresh = first + d == 0;
        multiply_block(q, a.lanes, block, depth, a.count, fresh, a.p, fetch);
      }
    }
  };
  part(rows.rank, 0, load_latents);
  part(rows.rope_dim, rows.rank, load_ropes);
  if (few) {
    heads.store_all();
  }
  for (int lane = 0; lane < a.lanes; lane += kHalf) {
    softmax_lanes(a, lane);
  }
}

void weigh(const CombineArgs& a, float* e, float* total) {
  for (int lane = 0; lane < a.lanes; lane += kHalf) {
    F16 most = splat(-__builtin_inff()), sum = zero();
    for (int s = 0; s < a.splits; s++) {
      most = larger(load(a.m + s * a.lanes + lane), most);
    }
    for (int s = 0; s < a.splits; s++) {
      const F16 w = exp_negative(sub(load(a.m + s * a.lanes + lane), most));
      store(e + s * a.lanes + lane, w);
      sum = fma(w, load(a.l + s * a.lanes + lane), sum);
    }
    store(total + lane, sum);
  }
}

// Adds e[h] times the sum over keys of p[key][h] v[key] to out[h].
template <int vectors, int heads>
GLM_INLINE void accumulate(
    const float* p,
    int lanes,
    const float* v,
    int count,
    const float* e,
    float* out,
    int stride) {
  F16 sum[heads * vectors];
  unroll_each<heads * vectors>(GLM_EACH(i) { sum[i] = zero(); });
  for (int key = 0; key < count; key++) {
    F16 value[vectors];
    unroll_each<vectors>(
        GLM_EACH(c) { value[c] = load(v + key * kSplit + c * kHalf); });
    unroll_each<heads>(GLM_EACH(h) {
      const F16 weight = splat(p[static_cast<size_t>(key) * lanes + h]);
      unroll_each<vectors>(GLM_EACH(c) {
        F16& to = sum[h * vectors + c];
        to = fma(weight, value[c], to);
      });
    });
  }
  unroll_each<heads * vectors>(GLM_EACH(i) {
    float* to = out + i / vectors * stride + i % vectors * kHalf;
    store(to, fma(splat(e[i / vectors]), sum[i], load(to)));
  });
}

// Adds one split's share to columns [c, c + 16 vectors) of every head.
template <int vectors>
void accumulate_heads(
    const CombineArgs& a,
    int s,
    const float* p,
    const float* v,
    float* out,
    int stride,
    RowFetch& fetch) {
  const float* e = a.e + static_cast<size_t>(s) * a.lanes;
  const int count = a.counts[s];
  int h = 0;
  for (; h + kDeep <= a.heads; h += kDeep) {
    float* to = out + h * stride;
    fetch.step();
    accumulate<vectors, kDeep>(p + h, a.lanes, v, count, e + h, to, stride);
  }
  for (; h < a.heads; h++) {
    float* to = out + h * stride;
    fetch.step();
    accumulate<vectors, 1>(p + h, a.lanes, v, count, e + h, to, stride);
  }
}

void combine(const CombineArgs& a) {
  const int stride = round_up(a.columns, kHalf);
  std::fill_n(a.sums, static_cast<size_t>(a.heads) * stride, 0.0f);
  alignas(64) float v[kSplit * kSplit];
  const int32_t* keys = a.keys;
  const float* p = a.p;
  for (int s = 0; s < a.splits; s++) {
    const int count = a.counts[s];
    const int next = s + 1 < a.splits ? a.counts[s + 1] : 0;
    RowFetch fetch(
        *a.rows,
        keys + count,
        next,
        a.column,
        a.columns,
        false,
        parts_of(stride / kHalf, kWide) * parts_of(a.heads, kDeep));
    for (int first = 0; first < a.columns; first += kSplit) {
      const int columns = std::min(kSplit, a.columns - first);
      load_latents({*a.rows, keys, count, a.column + first, columns, v});
      float* to = a.sums + first;
      int c = 0;
      for (; c + kWide * kHalf <= columns; c += kWide * kHalf) {
        accumulate_heads<kWide>(a, s, p, v + c, to + c, stride, fetch);
      }
      for (; c < columns; c += kHalf) {
        accumulate_heads<1>(a, s, p, v + c, to + c, stride, fetch);
      }
    }
    keys += count;
    p += static_cast<size_t>(count) * a.lanes;
  }
  for (int h = 0; h < a.heads; h++) {
    float* row = a.sums + h * stride;
    for (int c = 0; c < stride; c += kHalf) {
      store(row + c, div(load(row + c), splat(a.total[h])));
    }
    float* to = a.out + static_cast<size_t>(h) * a.rows->rank + a.column;
    std::copy_n(row, a.columns, to);
  }
}

int multiply_adds(int64_t count, float* result) {
#if defined(GLM_AVX512)
  constexpr int chains = 12;
#else
  constexpr int chains = 6;  // of two registers each, or four
#endif
  // No two lanes begin alike, and all are summed, so that the compiler has to
  // keep every one.
  float lanes[chains * kHalf];
  std::iota(std::begin(lanes), std::end(lanes), 1.0f);
  const F16 x = splat(*result), y = splat(0.5f);
  F16 sum[chains];
  unroll_each<chains>(GLM_EACH(i) { sum[i] = load(lanes + i * kHalf); });
  for (int64_t n = 0; n < count; n++) {
    unroll_each<chains>(GLM_EACH(i) { sum[i] = fma(sum[i], y, x); });
  }
  unroll_each<chains>(GLM_EACH(i) { store(lanes + i * kHalf, sum[i]); });
  *result = std::accumulate(std::begin(lanes), std::end(lanes), 0.0f);
  return chains * kHalf;
}

constexpr AttentionKernels attention_table(const char* name) {
  return {
      name,
      index_packed,
      index_pack,
      index_scores,
      index_spare,
      select,
      transpose,
      split,
      weigh,
      combine,
      multiply_adds};
}

}  // namespace
