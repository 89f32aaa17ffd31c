// The long-context kernels, compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/aligned_floats.h"
#include "cpu/attention_kernels.h"
#include "cpu/attention_select.h"
#include "cpu/attention_simd.h"

namespace {

using namespace glm_fused;
using namespace glm_fused::cpu;

#if defined(GLM_AVX512)
constexpr int kKeyVectors = 2, kHeads = 8;  // accumulators of the indexer
constexpr int kWide = 2, kDeep = 8;         // and of the attention
#else
constexpr int kKeyVectors = 1, kHeads = 4;
constexpr int kWide = 1, kDeep = 4;
#endif
constexpr int kKeys = kKeyVectors * kHalf;

inline float read_float(const uint8_t* p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}

inline void prefetch(const uint8_t* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) {
    __builtin_prefetch(from + at);
  }
}

GLM_INLINE F16 load16(const uint8_t* p, FloatType type) {
  if (type == FloatType::float32) {
    return as_float(load_words(p));
  }
  const U16 v = load_shorts(p);
  return type == FloatType::bfloat16 ? as_float(shift_left<16>(v))
                                     : half_to_float(v);
}

// The low byte of every word; 0x7f, e4m3's NaN, reads as 480.
GLM_INLINE F16 e4m3(U16 v) {
  const U16 sign = shift_left<8>(bits_and(v, 0x80u));
  const U16 half = bits_or(sign, shift_left<7>(bits_and(v, 0x7fu)));
  return mul(half_to_float(half), splat(256.0f));
}

// The low byte of every word, as int8.
GLM_INLINE F16 signed_byte(U16 v) {
  return sub(to_float(bits_and(add_words(v, 128u), 0xffu)), splat(128.0f));
}

// out[0, count rounded up to 16) = load(from + i * size), zeros past count.
template <class Load>
GLM_INLINE void
load_many(const uint8_t* from, int size, int count, float* out, Load&& load16) {
  int i = 0;
  for (; i + kHalf <= count; i += kHalf) {
    store(out + i, load16(from + i * size));
  }
  if (i < count) {
    uint8_t tail[4 * kHalf] = {};
    memcpy(tail, from + i * size, static_cast<size_t>(count - i) * size);
    store(out + i, load16(tail));
  }
}

inline void
load_floats(const uint8_t* from, FloatType type, int count, float* out) {
  const int size = static_cast<int>(size_of(type));
  switch (type) {
    case FloatType::float32:
      return load_many(from, size, count, out, [](const uint8_t* p) {
        return load16(p, FloatType::float32);
      });
    case FloatType::float16:
      return load_many(from, size, count, out, [](const uint8_t* p) {
        return load16(p, FloatType::float16);
      });
    default:
      return load_many(from, size, count, out, [](const uint8_t* p) {
        return load16(p, FloatType::bfloat16);
      });
  }
}

// Columns [begin, begin + count) of a row's latent or RoPE part as fp32; in the
// latent they lie within one scale tile.
inline void
load_latent(const Rows& rows, const Row& row, int begin, int count, float* to) {
  if (rows.format == RowFormat::floating) {
    const size_t size = size_of(rows.latent_type);
    return load_floats(row.latent + begin * size, rows.latent_type, count, to);
  }
  const bool fp8 = rows.format == RowFormat::fp8;
  const size_t tile = fp8 ? begin / kScaleTile : 0;
  const F16 scale = splat(read_float(row.scales + 4 * tile));
  const uint8_t* from = row.latent + begin;
  if (fp8) {
    load_many(from, 1, count, to, [&](const uint8_t* p) {
      return mul(e4m3(load_bytes(p)), scale);
    });
  } else {
    load_many(from, 1, count, to, [&](const uint8_t* p) {
      return mul(signed_byte(load_bytes(p)), scale);
    });
  }
}

inline void prefetch_latent(const Rows& rows, int key, int begin, int count) {
  const bool floating = rows.format == RowFormat::floating;
  const size_t size = floating ? size_of(rows.latent_type) : 1;
  prefetch(rows[key].latent + begin * size, count * size);
}

inline void
load_rope(const Rows& rows, const Row& row, int begin, int count, float* to) {
  const size_t size = size_of(rows.rope_type);
  load_floats(row.rope + begin * size, rows.rope_type, count, to);
}

int round_up(int n, int unit) {
  return (n + unit - 1) / unit * unit;
}

size_t index_packed(int heads, int dim) {
  return static_cast<size_t>(round_up(heads, kHeads)) * dim;
}

// [head group][dim][kHeads], zeros for the heads that are not there.
void index_pack(const float* q, int heads, int dim, float* packed) {
  for (int first = 0; first < heads; first += kHeads) {
    for (int d = 0; d < dim; d++) {
      for (int h = first; h < first + kHeads; h++) {
        *packed++ = h < heads ? q[static_cast<size_t>(h) * dim + d] : 0.0f;
      }
    }
  }
}

// Value d of sixteen rows goes to to[d * kKeys]. A word holds 4 / size values;
// convert(words, j, scale) makes value j of each, scale(at) being that of the
// block at byte `at`.
template <int size, class Scale, class Convert>
GLM_INLINE void load_columns(
    const uint8_t* const* rows,
    int dim,
    float* to,
    Scale&& scale,
    Convert&& convert) {
  constexpr int per_word = 4 / size, block = 4 * kHalf;
  for (int at = 0; at < dim * size; at += block) {
    U16 words[kHalf];
    const int left = dim * size - at;
    if (left >= block) {
      transpose_words(rows, at, words);
    } else {
      uint8_t padded[kHalf][block] = {};
      const uint8_t* tail[kHalf];
      for (int i = 0; i < kHalf; i++) {
        memcpy(padded[i], rows[i] + at, left);
        tail[i] = padded[i];
      }
      transpose_words(tail, 0, words);
    }
    const F16 by = scale(at);
    float* column = to + at / size * kKeys;
    unroll<kHalf>(GLM_EACH(w) {
      unroll<per_word>(GLM_EACH(j) {
        store(column + (w * per_word + j) * kKeys, convert(words[w], j, by));
      });
    });
  }
}

// Of values [at, at + 64) of each row.
GLM_INLINE F16 load_scales(const Rows& rows, const Row* row, int at) {
  float scales[kHalf];
  const size_t tile = rows.format == RowFormat::fp8 ? at / kScaleTile : 0;
  for (int i = 0; i < kHalf; i++) {
    scales[i] = read_float(row[i].scales + 4 * tile);
  }
  return load(scales);
}

void load_transposed(const Rows& rows, const Row* row, float* to) {
  const uint8_t* from[kHalf];
  for (int i = 0; i < kHalf; i++) {
    from[i] = row[i].latent;
  }
  const int dim = rows.rank;
  const auto unscaled = [](int) { return zero(); };
  const auto scale = [&](int at) { return load_scales(rows, row, at); };
  if (rows.format == RowFormat::fp8) {
    load_columns<1>(from, dim, to, scale, [](U16 words, auto j, F16 by) {
      return mul(e4m3(shift_right<8 * j>(words)), by);
    });
  } else if (rows.format == RowFormat::int8) {
    load_columns<1>(from, dim, to, scale, [](U16 words, auto j, F16 by) {
      return mul(signed_byte(shift_right<8 * j>(words)), by);
    });
  } else if (rows.latent_type == FloatType::float32) {
    load_columns<4>(from, dim, to, unscaled, [](U16 words, auto, F16) {
      return as_float(words);
    });
  } else if (rows.latent_type == FloatType::bfloat16) {
    load_columns<2>(from, dim, to, unscaled, [](U16 words, auto j, F16) {
      return as_float(j ? bits_and(words, 0xffff0000u) : shift_left<16>(words));
    });
  } else {
    load_columns<2>(from, dim, to, unscaled, [](U16 words, auto j, F16) {
      return half_to_float(shift_right<16 * j>(words));
    });
  }
}

// Keys [begin, end) transposed: tile[d * kKeys + key].
void load_keys(const IndexArgs& a, int begin, int end, float* tile) {
  for (int first = 0; first < kKeys; first += kHalf) {
    Row row[kHalf];
    for (int i = 0; i < kHalf; i++) {
      // Past the end the last key again: its scores are not stored.
      row[i] = a.keys[std::min(begin + first + i, end - 1)];
    }
    load_transposed(a.keys, row, tile + first);
  }
}

// score += weight * relu(dot * scale) for heads [0, heads) of one group.
GLM_INLINE void score_group(
    const float* q,
    const float* tile,
    const float* weight,
    int dim,
    int heads,
    F16 scale,
    F16 score[kKeyVectors]) {
  F16 dot[kHeads * kKeyVectors];
  unroll<kHeads * kKeyVectors>(GLM_EACH(i) { dot[i] = zero(); });
  for (int d = 0; d < dim; d++) {
    F16 key[kKeyVectors];
    unroll<kKeyVectors>(
        GLM_EACH(v) { key[v] = load(tile + d * kKeys + v * kHalf); });
    unroll<kHeads>(GLM_EACH(h) {
      const F16 query = splat(q[d * kHeads + h]);
      unroll<kKeyVectors>(GLM_EACH(v) {
        F16& sum = dot[h * kKeyVectors + v];
        sum = fma(query, key[v], sum);
      });
    });
  }
  unroll<kHeads>(GLM_EACH(h) {
    if (h < heads) {
      const F16 w = splat(weight[h]);
      unroll<kKeyVectors>(GLM_EACH(v) {
        const F16 term = relu(mul(dot[h * kKeyVectors + v], scale));
        score[v] = fma(w, term, score[v]);
      });
    }
  });
}

// Meanwhile fetches `next`, in equal shares, from memory.
void score_keys(
    const IndexArgs& a,
    int query,
    const float* tile,
    const uint8_t* next,
    size_t next_bytes,
    uint32_t* to) {
  const size_t share = next_bytes / (round_up(a.heads, kHeads) / kHeads);
  const float* q = a.q + query * index_packed(a.heads, a.dim);
  const float* weight = a.weights + static_cast<size_t>(query) * a.heads;
  F16 score[kKeyVectors];
  unroll<kKeyVectors>(GLM_EACH(v) { score[v] = zero(); });
  for (int h = 0; h < a.heads; h += kHeads) {
    prefetch(next, share);
    next += share;
    const float* group = q + static_cast<size_t>(h) * a.dim;
    const int heads = std::min(kHeads, a.heads - h);
    score_group(group, tile, weight + h, a.dim, heads, splat(a.scale), score);
  }
  unroll<kKeyVectors>(
      GLM_EACH(v) { store_words(to + v * kHalf, ordered(score[v])); });
}

void index_scores(const IndexArgs& a) {
  const AlignedFloats tile(
      static_cast<size_t>(round_up(a.dim, 4 * kHalf)) * kKeys);
  for (int begin = a.begin; begin < a.end; begin += kKeys) {
    const int end = std::min(begin + kKeys, a.end);
    load_keys(a, begin, end, tile.get());
    // For one query the next keys come while these are scored.
    const int more = a.queries == 1 ? std::min(kKeys, a.end - end) : 0;
    const uint8_t* next = a.keys.latents + end * a.keys.latent_stride;
    for (int i = 0; i < a.queries; i++) {
      if (end <= a.low[i] || begin >= a.high[i]) {
        continue;
      }
      uint32_t words[kKeys];
      score_keys(a, i, tile.get(), next, more * a.keys.latent_stride, words);
      std::copy_n(words, end - begin, a.scores + i * a.stride + begin);
    }
  }
}

// s[key][lane] += sum over d of q[d][lane] k[key][d], `vectors` vectors of
// lanes by `keys` keys in registers.
template <int vectors, int keys>
GLM_INLINE void
multiply(const float* q, int lanes, const float* k, int depth, float* s) {
  F16 sum[vectors * keys];
  unroll<vectors * keys>(GLM_EACH(i) {
    sum[i] = load(s + i / vectors * lanes + i % vectors * kHalf);
  });
  for (int d = 0; d < depth; d++) {
    F16 query[vectors];
    unroll<vectors>(
        GLM_EACH(v) { query[v] = load(q + d * lanes + v * kHalf); });
    unroll<keys>(GLM_EACH(j) {
      const F16 key = splat(k[j * kSplit + d]);
      unroll<vectors>(GLM_EACH(v) {
        F16& to = sum[j * vectors + v];
        to = fma(query[v], key, to);
      });
    });
  }
  unroll<vectors * keys>(GLM_EACH(i) {
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
    float* s) {
  int key = 0;
  for (; key + kDeep <= count; key += kDeep) {
    multiply<vectors, kDeep>(
        q, lanes, k + key * kSplit, depth, s + key * lanes);
  }
  for (; key < count; key++) {
    multiply<vectors, 1>(q, lanes, k + key * kSplit, depth, s + key * lanes);
  }
}

// All lanes, for a block of at most kSplit dimensions.
void multiply_block(
    const float* q,
    int lanes,
    const float* k,
    int depth,
    int count,
    float* s) {
  int lane = 0;
  for (; lane + kWide * kHalf <= lanes; lane += kWide * kHalf) {
    multiply_lanes<kWide>(q + lane, lanes, k, depth, count, s + lane);
  }
  for (; lane < lanes; lane += kHalf) {
    multiply_lanes<1>(q + lane, lanes, k, depth, count, s + lane);
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

void split(const SplitArgs& a) {
  const Rows& rows = *a.rows;
  std::fill_n(a.p, static_cast<size_t>(a.count) * a.lanes, 0.0f);
  alignas(64) float block[kSplit * kSplit];
  const auto part = [&](int dims, const float* q, auto load_part) {
    for (int d = 0; d < dims; d += kSplit) {
      const int depth = std::min(kSplit, dims - d);
      for (int i = 0; i < a.count; i++) {
        load_part(rows, rows[a.keys[i]], d, depth, block + i * kSplit);
      }
      for (int i = 0; i < a.next_count; i++) {
        prefetch_latent(rows, a.keys[a.count + i], d, depth);
      }
      const float* at = q + static_cast<size_t>(d) * a.lanes;
      multiply_block(at, a.lanes, block, depth, a.count, a.p);
    }
  };
  part(rows.rank, a.q, load_latent);
  const size_t ropes = static_cast<size_t>(rows.rank) * a.lanes;
  part(rows.rope_dim, a.q + ropes, load_rope);
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

// out[h] += e[h] * sum over keys of p[key][h] v[key].
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
  unroll<heads * vectors>(GLM_EACH(i) { sum[i] = zero(); });
  for (int key = 0; key < count; key++) {
    F16 value[vectors];
    unroll<vectors>(
        GLM_EACH(c) { value[c] = load(v + key * kSplit + c * kHalf); });
    unroll<heads>(GLM_EACH(h) {
      const F16 weight = splat(p[static_cast<size_t>(key) * lanes + h]);
      unroll<vectors>(GLM_EACH(c) {
        F16& to = sum[h * vectors + c];
        to = fma(weight, value[c], to);
      });
    });
  }
  unroll<heads * vectors>(GLM_EACH(i) {
    float* to = out + i / vectors * stride + i % vectors * kHalf;
    store(to, fma(splat(e[i / vectors]), sum[i], load(to)));
  });
}

// One split's share of columns [c, c + 16 vectors) of every head.
template <int vectors>
void accumulate_heads(
    const CombineArgs& a,
    int s,
    const float* p,
    const float* v,
    float* out,
    int stride) {
  const float* e = a.e + static_cast<size_t>(s) * a.lanes;
  const int count = a.counts[s];
  int h = 0;
  for (; h + kDeep <= a.heads; h += kDeep) {
    float* to = out + h * stride;
    accumulate<vectors, kDeep>(p + h, a.lanes, v, count, e + h, to, stride);
  }
  for (; h < a.heads; h++) {
    float* to = out + h * stride;
    accumulate<vectors, 1>(p + h, a.lanes, v, count, e + h, to, stride);
  }
}

void combine(const CombineArgs& a) {
  const int stride = round_up(a.columns, kHalf);
  const AlignedFloats out(static_cast<size_t>(a.heads) * stride);
  std::fill_n(out.get(), static_cast<size_t>(a.heads) * stride, 0.0f);
  alignas(64) float v[kSplit * kSplit];
  const int32_t* keys = a.keys;
  const float* p = a.p;
  for (int s = 0; s < a.splits; s++) {
    const int count = a.counts[s];
    const int next = s + 1 < a.splits ? a.counts[s + 1] : 0;
    for (int first = 0; first < a.columns; first += kSplit) {
      const int columns = std::min(kSplit, a.columns - first);
      for (int i = 0; i < count; i++) {
        const Row row = (*a.rows)[keys[i]];
        load_latent(*a.rows, row, a.column + first, columns, v + i * kSplit);
      }
      for (int i = 0; i < next; i++) {
        prefetch_latent(*a.rows, keys[count + i], a.column + first, columns);
      }
      float* to = out.get() + first;
      int c = 0;
      for (; c + kWide * kHalf <= columns; c += kWide * kHalf) {
        accumulate_heads<kWide>(a, s, p, v + c, to + c, stride);
      }
      for (; c < columns; c += kHalf) {
        accumulate_heads<1>(a, s, p, v + c, to + c, stride);
      }
    }
    keys += count;
    p += static_cast<size_t>(count) * a.lanes;
  }
  for (int h = 0; h < a.heads; h++) {
    float* row = out.get() + h * stride;
    for (int c = 0; c < stride; c += kHalf) {
      store(row + c, div(load(row + c), splat(a.total[h])));
    }
    float* to = a.out + static_cast<size_t>(h) * a.rows->rank + a.column;
    std::copy_n(row, a.columns, to);
  }
}

int multiply_adds(int64_t count, float* result) {
  constexpr int chains = 12;
  const F16 x = splat(*result), y = splat(0.5f);
  F16 sum[chains];
  unroll<chains>(GLM_EACH(i) { sum[i] = splat(1.0f + i); });
  for (int64_t n = 0; n < count; n++) {
    unroll<chains>(GLM_EACH(i) { sum[i] = fma(sum[i], y, x); });
  }
  F16 all = zero();
  unroll<chains>(GLM_EACH(i) { all = add(all, sum[i]); });
  float lanes[kHalf];
  store(lanes, all);
  *result = lanes[0];
  return chains * kHalf;
}

constexpr AttentionKernels attention_table(const char* name) {
  return {
      name,
      index_packed,
      index_pack,
      index_scores,
      select,
      split,
      weigh,
      combine,
      multiply_adds};
}

}  // namespace
