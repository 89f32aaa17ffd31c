// Dot products of a format's rows with packed vectors. Included by the formats'
// headers, where they are compiled as kernels.
#pragma once

#include <cstring>

#include "cpu/dot/dot_kernels.h"
#include "cpu/dot/group_scales.h"
#include "cpu/dot/lanes.h"

namespace {

using glm_fused::cpu::DotArgs;
using glm_fused::cpu::Kernel;

// Rows of W that share one load of x when there is one vector.
#if defined(GLM_AVX512)
constexpr int kRowsAtOnce = 4;
#elif defined(GLM_AVX2)
constexpr int kRowsAtOnce = 2;
#else
constexpr int kRowsAtOnce = 1;
#endif
// Groups of rows that meet a chunk of packed x while it is in the L1 cache,
// and the half-blocks of such a chunk.
template <int M>
constexpr int kGroups = M == 1 ? 32 / kRowsAtOnce : 8;
template <int M>
constexpr int kChunk = M == 1 ? 8 : 2;

// Short rows are fetched so many bytes ahead, which a core takes longer for
// than the L3 cache to answer.
constexpr ptrdiff_t kAhead = 2048;

// Packed x: per block and half, kTerms terms of 16 lanes, then the lane sums
// that multiply a bias.
template <class F>
constexpr int vectors_per_half = F::kTerms + (F::kSumStep ? 1 : 0);
template <class F>
constexpr int floats_per_block = 2 * vectors_per_half<F> * kHalf;

// Sets v[i] to value i of every lane; before, the lanes' values follow one
// another.
template <int n>
GLM_INLINE void by_value(F16 (&v)[n]) {
  if constexpr (n > 1) {
    F16 even[n / 2], odd[n / 2];
    unroll<n / 2>(
        GLM_EACH(i) { split_lanes(v[2 * i], v[2 * i + 1], even[i], odd[i]); });
    by_value(even);
    by_value(odd);
    unroll<n / 2>(GLM_EACH(i) {
      v[2 * i] = even[i];
      v[2 * i + 1] = odd[i];
    });
  }
}

template <class F>
GLM_INLINE F16 lane_sums(const F16 (&x)[F::kValues]) {
  F16 sum = zero();
  unroll<F::kValues / F::kSumStep>(GLM_EACH(j) {
    F16 part = x[j * F::kSumStep];
    for (int i = 1; i < F::kSumStep; i++) {
      part = add(part, x[j * F::kSumStep + i]);
    }
    sum = add(sum, part);
  });
  return sum;
}

template <class F>
void pack(const float* x, int k, float* panel, int m, int width) {
  constexpr int values = kHalf * F::kValues;
  float* out = panel + m * kHalf;
  for (int base = 0; base < k; base += values) {
    float padded[values];
    const float* from = x + base;
    if (k - base < values) {
      memset(padded, 0, sizeof(padded));
      memcpy(padded, from, (k - base) * sizeof(float));
      from = padded;
    }
    F16 v[F::kValues];
    unroll<F::kValues>(GLM_EACH(i) { v[i] = load(from + i * kHalf); });
    by_value(v);
    for_each_constant<F::kTerms>(GLM_EACH(p) {
      constexpr Term t = F::term(p);
      const F16 scaled = mul(mul(v[t.value], splat(t.scale)), splat(t.carry));
      store(out + p * width * kHalf, scaled);
    });
    if constexpr (F::kSumStep > 0) {
      store(out + F::kTerms * width * kHalf, lane_sums<F>(v));
    }
    out += vectors_per_half<F> * width * kHalf;
  }
}

// One half-block of R rows against M vectors of a panel. `Width` is the
// panel's width, a Constant where the compiler may fold it into addresses.
template <class F, int R, int M, class Width>
struct HalfBlock {
  const F& format;
  const float* x;
  const Width width;
  typename F::Words words[R];
  F16 acc[R][M];
  F16 quad[R][M];

  GLM_INLINE HalfBlock(const F& f, const float* panel, Width w)
      : format(f), x(panel), width(w) {}

  template <int p>
  GLM_INLINE void term() {
    F16 d[R];
    unroll<R>(GLM_EACH(r) { d[r] = format.template decode<p>(words[r]); });
    unroll<M>(GLM_EACH(m) {
      const F16 xp = load(x + (p * width + m) * kHalf);
      unroll<R>(GLM_EACH(r) {
        if constexpr (!F::kQuads) {
          acc[r][m] = fma(xp, d[r], acc[r][m]);
        } else if constexpr (p % 4 == 1) {
          quad[r][m] = mul(xp, d[r]);
        } else {
          quad[r][m] = fma(xp, d[r], quad[r][m]);
        }
      });
    });
  }

  // a*b + c*d + e*f + g*h contracts to fma(g,h, fma(e,f, fma(a,b, c*d))).
  template <int p>
  GLM_INLINE void terms() {
    if constexpr (F::kQuads && p < F::kTerms) {
      term<p + 1>();
      term<p>();
      term<p + 2>();
      term<p + 3>();
      unroll<R>(GLM_EACH(r) {
        unroll<M>(GLM_EACH(m) { acc[r][m] = add(acc[r][m], quad[r][m]); });
      });
      terms<p + 4>();
    } else if constexpr (p < F::kTerms) {
      term<p>();
      terms<p + 1>();
    }
  }
};

template <CpuDecode F>
struct Tile {
  const DotArgs& a;
  const F format{};
  const typename F::Scales scales;
  const size_t row_bytes;

  GLM_INLINE explicit Tile(const DotArgs& args)
      : a(args),
        scales(args, F::kValues),
        row_bytes(args.format.row_bytes(0, args.k)) {}

  GLM_INLINE int half_blocks() const {
    constexpr int values = kHalf * F::kValues;
    return (a.k + values - 1) / values;
  }

  // R rows from `row` on, or that row R times.
  template <int R>
  GLM_INLINE TileRows locate(int row, int stride) const {
    TileRows rows;
    rows.weight = a.planes[0] + row * row_bytes;
    rows.weight_stride = static_cast<ptrdiff_t>(stride * row_bytes);
    scales.template locate<R>(rows, row, stride);
    return rows;
  }

  // Loads half-block `hb` of the rows, with zeros past the end of a row.
  // `ahead` is how far from there the rows' next bytes lie.
  template <int R>
  GLM_INLINE void load_half(
      const TileRows& rows,
      int hb,
      ptrdiff_t ahead,
      typename F::Words (&words)[R]) const {
    constexpr size_t whole = F::kHalfBytes;
    const ptrdiff_t stride = rows.weight_stride;
    const uint8_t* half = rows.weight + hb * whole;
    unroll<R>(GLM_EACH(r) {
      __builtin_prefetch(half + r * stride + ahead);
      if constexpr (whole > 64) {
        __builtin_prefetch(half + r * stride + ahead + 64);
      }
    });
    const size_t left = row_bytes - hb * whole;
    if (__builtin_expect(left >= whole + F::Words::kOverread, 1)) {
      unroll<R>(GLM_EACH(r) { words[r].load(half + r * stride); });
    } else {
      unroll<R>(GLM_EACH(r) {
        load_first<whole>(words[r], half + r * stride, left);
      });
    }
  }

  // Adds half-block `hb` of the rows to result[r][m].
  template <int R, int M, class Width>
  GLM_INLINE void half_block(
      const TileRows& rows,
      int m0,
      Width width,
      int hb,
      ptrdiff_t ahead,
      F16 (&result)[R][M]) const {
    const size_t vectors = static_cast<size_t>(hb) * vectors_per_half<F>;
    const float* x = a.x + (vectors * width + m0) * kHalf;
    HalfBlock<F, R, M, Width> block(format, x, width);
    load_half(rows, hb, ahead, block.words);
    unroll<R>(GLM_EACH(r) {
      unroll<M>(GLM_EACH(m) {
        block.acc[r][m] = F::kCarriesAccumulator ? result[r][m] : zero();
      });
    });
    block.template terms<0>();
    const float* sums = x + F::kTerms * width * kHalf;
    scales.finish(rows, hb, sums, block.acc, result);
  }

  // The half-blocks [begin, end) of R rows; begin is even.
  template <int R, int M, class Width>
  GLM_INLINE void chunk(
      const TileRows& rows,
      int m0,
      Width width,
      int begin,
      int end,
      ptrdiff_t ahead,
      F16 (&sums)[2][R][M]) const {
    if constexpr (M > 1) {
      for (int hb = begin; hb < end; hb++) {
        half_block<R, M>(rows, m0, width, hb, ahead, sums[hb % 2]);
      }
      return;
    }
    // One vector: the sums of both halves fit in registers.
    F16 even[R][M], odd[R][M];
    unroll<R>(GLM_EACH(r) {
      even[r][0] = sums[0][r][0];
      odd[r][0] = sums[1][r][0];
    });
    for (int hb = begin; hb < end; hb += 2) {
      half_block<R, M>(rows, m0, width, hb, ahead, even);
      if (hb + 1 < end) {
        half_block<R, M>(rows, m0, width, hb + 1, ahead, odd);
      }
    }
    unroll<R>(GLM_EACH(r) {
      sums[0][r][0] = even[r][0];
      sums[1][r][0] = odd[r][0];
    });
  }

  // Up to kGroups groups of R rows, chunk by chunk of the columns. The last
  // group of a tile overlaps the one before it where R does not divide the
  // rows; a tile of fewer than R rows takes each of them R times.
  template <int R, int M, class Width>
  GLM_INLINE void groups_of_rows(int row, int m0, Width width) const {
    constexpr int G = kGroups<M>;
    const int step = a.rows < R ? 1 : R, stride = a.rows < R ? 0 : 1;
    const int left = (a.rows - row + step - 1) / step;
    const int groups = left < G ? left : G;
    const auto first = [&](int g) {
      const int at = row + g * step;
      return at + step <= a.rows ? at : a.rows - step;
    };
    const int halves = half_blocks();
    if (M == 1 && halves <= kChunk<M>) {  // the sums never leave the registers
      const ptrdiff_t group = step * row_bytes;
      const ptrdiff_t ahead = (kAhead + group - 1) / group * group;
      for (int g = 0; g < groups; g++) {
        F16 sums[2][R][M] = {};
        const TileRows rows = locate<R>(first(g), stride);
        chunk<R, M>(rows, m0, width, 0, halves, ahead, sums);
        write<R, M>(first(g), step, m0, sums);
      }
      return;
    }
    F16 sums[G][2][R][M];
    for (int g = 0; g < groups; g++) {
      for (int r = 0; r < R; r++) {
        for (int m = 0; m < M; m++) {
          sums[g][0][r][m] = sums[g][1][r][m] = zero();
        }
      }
    }
    for (int begin = 0; begin < halves; begin += kChunk<M>) {
      const int end = begin + kChunk<M> < halves ? begin + kChunk<M> : halves;
      const ptrdiff_t next_group = step * row_bytes;
      // After the last group: the first one's next chunk, or the next rows.
      const ptrdiff_t next_chunk = end < halves
          ? kChunk<M> * F::kHalfBytes - (groups - 1) * next_group
          : next_group - begin * F::kHalfBytes;
      for (int g = 0; g < groups; g++) {
        const ptrdiff_t ahead = g + 1 < groups ? next_group : next_chunk;
        const TileRows rows = locate<R>(first(g), stride);
        chunk<R, M>(rows, m0, width, begin, end, ahead, sums[g]);
      }
    }
    for (int g = 0; g < groups; g++) {
      write<R, M>(first(g), step, m0, sums[g]);
    }
  }

  // Stores the sums of `count` rows from `row` on.
  template <int R, int M>
  GLM_INLINE void write(int row, int count, int m0, const F16 (&sums)[2][R][M])
      const {
    for (int m = 0; m < M; m++) {
      F16 low[R], high[R];
      unroll<R>(GLM_EACH(r) {
        low[r] = sums[0][r][m];
        high[r] = sums[1][r][m];
      });
      float totals[R];
      butterfly_sums(low, high, totals);
      for (int r = 0; r < count; r++) {
        a.y[(m0 + m) * a.rows + row + r] = scales.total(totals[r]);
      }
    }
  }

  template <int M, class Width>
  __attribute__((noinline)) void all_rows(int m0, Width width) const {
    constexpr int R = M == 1 ? kRowsAtOnce : 1;
    const int step = kGroups<M> * (a.rows < R ? 1 : R);
    for (int row = 0; row < a.rows; row += step) {
      groups_of_rows<R, M>(row, m0, width);
    }
  }

  GLM_INLINE void all() const {
#if defined(GLM_AVX512)
    switch (a.width) {
      case 1:
        return all_rows<1>(0, Constant<1>());
      case 2:
        return all_rows<2>(0, Constant<2>());
      case 4:
        return all_rows<4>(0, Constant<4>());
      default:
        return all_rows<8>(0, Constant<8>());
    }
#elif defined(GLM_AVX2)
    for (int m = 0; m < a.width;) {
      if (a.width >= 4) {
        all_rows<4>(m, a.width);
        m += 4;
      } else {
        all_rows<1>(m, a.width);
        m += 1;
      }
    }
#else
    for (int m = 0; m < a.width; m++) {
      all_rows<1>(m, a.width);
    }
#endif
  }
};

template <class F>
void dot(const DotArgs& args) {
  Tile<F>(args).all();
}

template <class F>
constexpr Kernel kernel{dot<F>, pack<F>, F::kValues, floats_per_block<F>};

}  // namespace
