// Dot products of a format's rows with packed vectors. Included by the formats'
// headers, where they are compiled as kernels.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/dot/dot_kernels.h"
#include "cpu/dot/group_scales.h"
#include "cpu/dot/lanes.h"

namespace {

using glm_fused::cpu::DotArgs;
using glm_fused::cpu::Kernel;

// Rows of W that share one load of x when there is one vector, where there are
// registers for them. Straddling columns make a lane's sum so long that rows
// met one by one would wait for it.
#if defined(GLM_AVX512)
template <class F>
constexpr int kRowsAtOnce = 4;
#elif defined(GLM_AVX2)
template <class F>
constexpr int kRowsAtOnce = F::kTerms > F::kValues ? 4 : 1;
#else
template <class F>
constexpr int kRowsAtOnce = 1;
#endif
// One vector meets whole rows, so that weights are read in the order of their
// addresses. Those to come are fetched to the L2 cache a group of rows ahead,
// or at least so many bytes, in which time the L3 cache answers.
constexpr ptrdiff_t kAhead = 2048;
// Several vectors meet a few rows chunk by chunk, so that a chunk of them stays
// in the L1 cache: so many rows, and half-blocks of a chunk.
constexpr int kRows = 8, kChunk = 2;

// Whether a format decodes terms p and p + 4 together, so that the terms of two
// quads are met in turn; and whether terms p and p + 4 of the same lane lie
// side by side (interleave_lanes), those of half of the lanes in either.
template <class F>
constexpr bool kDecodesPairs = requires { requires F::kDecodesPairs; };
template <class F>
constexpr bool kInterleaves = requires { requires F::kInterleaves; };
template <class F>
constexpr int kQuadsAtOnce = kDecodesPairs<F> ? 2 : 1;

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
    if constexpr (kInterleaves<F>) {
      unroll<F::kValues>(GLM_EACH(i) {
        if constexpr (i % 8 < 4) {
          interleave_lanes(v[i], v[i + 4]);
        }
      });
    }
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

// v, or NaN where a code of the lane's words is, if the format's decode of
// codes leaves that to be told.
template <class F>
GLM_INLINE F16
with_nan(const F& format, const typename F::Words& words, F16 v) {
  if constexpr (requires { format.with_nan(words, v); }) {
    return format.with_nan(words, v);
  } else {
    return v;
  }
}

// Loads a lane's words of which only the first `count` bytes are there.
template <class F>
GLM_INLINE void load_first(
    const F& format,
    typename F::Words& words,
    const uint8_t* p,
    size_t count) {
  if constexpr (requires { format.load(words, p); }) {
    uint8_t padded[F::kMostHalfBytes];
    copy_padded(padded, p, std::min(count, format.half_bytes()));
    format.load(words, padded);
  } else {
    load_first<F::kHalfBytes>(words, p, count);
  }
}
template <class F>
GLM_INLINE void
load_whole(const F& format, typename F::Words& words, const uint8_t* p) {
  if constexpr (requires { format.load(words, p); }) {
    format.load(words, p);
  } else {
    words.load(p);
  }
}

template <class F>
GLM_INLINE F format_of(const DotArgs& a) {
  if constexpr (std::constructible_from<F, const glm_fused::Format&>) {
    return F(a.format);
  } else {
    return F();
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
  F16 quad[kQuadsAtOnce<F>][R][M];

  GLM_INLINE HalfBlock(const F& f, const float* panel, Width w)
      : format(f), x(panel), width(w) {}

  // Term p, of the sum of all or of one of the quads at hand.
  template <int p, int q = 0>
  GLM_INLINE void term() {
    F16 xs[M];
    unroll<M>(GLM_EACH(m) { xs[m] = load(x + (p * width + m) * kHalf); });
    unroll<R>(GLM_EACH(r) {
      const F16 d = format.template decode<p>(words[r]);
      unroll<M>(GLM_EACH(m) {
        if constexpr (!F::kQuads) {
          acc[r][m] = fma(xs[m], d, acc[r][m]);
        } else if constexpr (p % 4 == 1) {
          quad[q][r][m] = mul(xs[m], d);
        } else {
          quad[q][r][m] = fma(xs[m], d, quad[q][r][m]);
        }
      });
    });
  }

  // a*b + c*d + e*f + g*h contracts to fma(g,h, fma(e,f, fma(a,b, c*d))).
  template <int p>
  GLM_INLINE void quads() {
    constexpr int n = kQuadsAtOnce<F>, order[] = {1, 0, 2, 3};
    for_each_constant<4>(GLM_EACH(i) {
      for_each_constant<n>(GLM_EACH(q) { term<p + 4 * q + order[i], q>(); });
    });
    if constexpr (kInterleaves<F>) {
      unroll<R>(GLM_EACH(r) {
        unroll<M>(
            GLM_EACH(m) { separate_lanes(quad[0][r][m], quad[1][r][m]); });
      });
    }
    unroll<n>(GLM_EACH(q) {
      unroll<R>(GLM_EACH(r) {
        unroll<M>(GLM_EACH(m) {
          // Whether a sum of zeros is -0 makes no difference to the result.
          acc[r][m] =
              p + q == 0 ? quad[q][r][m] : add(acc[r][m], quad[q][r][m]);
        });
      });
    });
  }

  template <int p>
  GLM_INLINE void terms() {
    if constexpr (F::kQuads && p < F::kTerms) {
      quads<p>();
      terms<p + 4 * kQuadsAtOnce<F>>();
    } else if constexpr (p < F::kTerms) {
      term<p>();
      terms<p + 1>();
    } else {
      unroll<R>(GLM_EACH(r) {
        unroll<M>(
            GLM_EACH(m) { acc[r][m] = with_nan(format, words[r], acc[r][m]); });
      });
    }
  }
};

template <CpuDecode F>
struct Tile {
  const DotArgs& a;
  const float* x = nullptr;  // the panel at hand, and where its results go
  float* y = nullptr;
  const F format;
  const typename F::Scales scales;
  const size_t row_bytes;

  GLM_INLINE explicit Tile(const DotArgs& args)
      : a(args),
        format(format_of<F>(args)),
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
    const int last = row + (R - 1) * stride;
    const size_t left = (a.rows_left - last) * row_bytes;
    const size_t readable =
        left < F::Words::kOverread ? 0 : left - F::Words::kOverread;
    rows.whole_halves = rows.direct_halves =
        static_cast<int>(std::min(readable, row_bytes) / half_bytes(format));
    scales.template locate<R>(rows, row, stride);
    return rows;
  }

  // Loads half-block `hb` of the rows, with zeros past the end of a row.
  // `ahead` is how far from there the rows' next bytes lie.
  template <class Reading, int R>
  GLM_INLINE void load_half(
      const TileRows& rows,
      int hb,
      ptrdiff_t ahead,
      typename F::Words (&words)[R]) const {
    const size_t whole = half_bytes(format);
    const ptrdiff_t stride = rows.weight_stride;
    const uint8_t* half = rows.weight + hb * whole;
    unroll<R>(GLM_EACH(r) { prefetch(half + r * stride + ahead, whole); });
    if (Reading::kInPlace || hb < rows.whole_halves) {
      unroll<R>(
          GLM_EACH(r) { load_whole(format, words[r], half + r * stride); });
    } else {
      const size_t left = row_bytes - hb * whole;
      unroll<R>(GLM_EACH(r) {
        load_first(format, words[r], half + r * stride, left);
      });
    }
  }

  // Adds half-block `hb` of the rows to result[r][m].
  template <class Reading, int R, int M, class Width>
  GLM_INLINE void half_block(
      const TileRows& rows,
      int m0,
      Width width,
      int hb,
      ptrdiff_t ahead,
      F16 (&result)[R][M]) const {
    const size_t vectors = static_cast<size_t>(hb) * vectors_per_half<F>;
    const float* from = x + (vectors * width + m0) * kHalf;
    HalfBlock<F, R, M, Width> block(format, from, width);
    load_half<Reading>(rows, hb, ahead, block.words);
    unroll<R>(GLM_EACH(r) {
      unroll<M>(GLM_EACH(m) {
        block.acc[r][m] = F::kCarriesAccumulator ? result[r][m] : zero();
      });
    });
    block.template terms<0>();
    const float* sums = from + F::kTerms * width * kHalf;
    scales.template finish<Reading>(rows, hb, sums, block.acc, result);
  }

  // Does so with the half-blocks from `hb` on, which need not be whole.
  template <int R, class Width>
  __attribute__((noinline)) void rest(
      const TileRows& rows,
      int m0,
      Width width,
      int hb,
      ptrdiff_t ahead,
      F16 (&even)[R][1],
      F16 (&odd)[R][1]) const {
    for (const int halves = half_blocks(); hb < halves; hb++) {
      half_block<Anywhere>(
          rows, m0, width, hb, ahead, hb % 2 == 0 ? even : odd);
    }
  }

  // All rows against vector m0 of a panel, R at once. The last R overlap those
  // before where R does not divide the rows; of fewer than R, each is taken R
  // times.
  template <int R, class Reading, class Width>
  __attribute__((noinline)) void one_vector(int m0, Width width) const {
    const int step = a.rows < R ? 1 : R, stride = a.rows < R ? 0 : 1;
    const ptrdiff_t group = step * row_bytes;
    const ptrdiff_t ahead = (kAhead + group - 1) / group * group;
    const int halves = half_blocks();
    for (int row = 0; row < a.rows; row += step) {
      const int first = row + step <= a.rows ? row : a.rows - step;
      const TileRows rows = locate<R>(first, stride);
      const int direct = rows.direct_halves;
      const int behind = row + static_cast<int>(ahead / group) * step;
      const uint8_t* const* to =
          a.next[0] && behind >= a.rows ? a.next : a.planes;
      const int at = to == a.next ? behind - a.rows : behind;
      const ptrdiff_t on = to[0] + at * row_bytes - rows.weight;
      scales.prefetch(to, at, step);
      F16 even[R][1], odd[R][1];  // they stay in registers
      unroll<R>(GLM_EACH(r) { even[r][0] = odd[r][0] = zero(); });
      int hb = 0;
      for (; hb + 1 < direct; hb += 2) {
        half_block<Reading>(rows, m0, width, hb, on, even);
        half_block<Reading>(rows, m0, width, hb + 1, on, odd);
      }
      if (hb < direct) {
        half_block<Reading>(rows, m0, width, hb++, on, even);
      }
      if (hb < halves) {
        F16 rest_even[R][1], rest_odd[R][1];
        unroll<R>(GLM_EACH(r) {
          rest_even[r][0] = even[r][0];
          rest_odd[r][0] = odd[r][0];
        });
        rest(rows, m0, width, hb, on, rest_even, rest_odd);
        unroll<R>(GLM_EACH(r) {
          even[r][0] = rest_even[r][0];
          odd[r][0] = rest_odd[r][0];
        });
      }
      write<R, 1>(first, step, m0, even, odd);
    }
  }

  template <class Width>
  GLM_INLINE void one_vector(int m0, Width width) const {
    scales.with_reading([&]<class Reading>(Reading) GLM_ALWAYS_INLINE {
      one_vector<kRowsAtOnce<F>, Reading>(m0, width);
    });
  }

  // All rows against M vectors of a panel.
  template <int M, class Width>
  __attribute__((noinline)) void several_vectors(int m0, Width width) const {
    const int halves = half_blocks();
    const auto next_row = static_cast<ptrdiff_t>(row_bytes);
    const auto half = static_cast<ptrdiff_t>(half_bytes(format));
    for (int row = 0; row < a.rows; row += kRows) {
      const int count = a.rows - row < kRows ? a.rows - row : kRows;
      F16 sums[kRows][2][1][M];
      for (int r = 0; r < count; r++) {
        for (int m = 0; m < M; m++) {
          sums[r][0][0][m] = sums[r][1][0][m] = zero();
        }
      }
      for (int begin = 0; begin < halves; begin += kChunk) {
        const int end = begin + kChunk < halves ? begin + kChunk : halves;
        // After the last row: the first one's next chunk, or the next rows.
        const ptrdiff_t next_chunk = end < halves
            ? kChunk * half - (count - 1) * next_row
            : next_row - begin * half;
        for (int r = 0; r < count; r++) {
          const ptrdiff_t ahead = r + 1 < count ? next_row : next_chunk;
          const TileRows rows = locate<1>(row + r, 1);
          for (int hb = begin; hb < end; hb++) {
            half_block<Anywhere>(rows, m0, width, hb, ahead, sums[r][hb % 2]);
          }
        }
      }
      for (int r = 0; r < count; r++) {
        write<1, M>(row + r, 1, m0, sums[r][0], sums[r][1]);
      }
    }
  }

  // Stores the sums of `count` rows from `row` on.
  template <int R, int M>
  GLM_INLINE void write(
      int row,
      int count,
      int m0,
      const F16 (&even)[R][M],
      const F16 (&odd)[R][M]) const {
    for (int m = 0; m < M; m++) {
      F16 low[R], high[R];
      unroll<R>(GLM_EACH(r) {
        low[r] = even[r][m];
        high[r] = odd[r][m];
      });
      float totals[R];
      butterfly_sums(low, high, totals);
      for (int r = 0; r < count; r++) {
        y[(m0 + m) * a.rows + row + r] = scales.total(totals[r]);
      }
    }
  }

  GLM_INLINE void all() {
    for (size_t i = 0; i < a.x.size(); i++) {
      x = a.x[i];
      y = a.y + i * a.width * a.rows;
      panel();
    }
  }

  GLM_INLINE void panel() const {
#if defined(GLM_AVX512)
    switch (a.width) {
      case 1:
        return one_vector(0, Constant<1>());
      case 2:
        return several_vectors<2>(0, Constant<2>());
      default:
        return several_vectors<4>(0, Constant<4>());
    }
#elif defined(GLM_AVX2)
    for (int m = 0; m < a.width;) {
      if (a.width >= 4) {
        several_vectors<4>(m, a.width);
        m += 4;
      } else {
        one_vector(m, a.width);
        m += 1;
      }
    }
#else
    for (int m = 0; m < a.width; m++) {
      one_vector(m, a.width);
    }
#endif
  }
};

}  // namespace

#include "cpu/dot/dot_panels.h"
#include "cpu/dot/joined_rows.h"

namespace {

template <class F>
void dot(const DotArgs& args) {
#if defined(GLM_AVX512)
  if (args.width == 8) {
    DotPanels<F>(args).all();
    return;
  }
  if constexpr (requires { requires F::kJoinsRows; }) {
    if (JoinedRows<F>::takes(args)) {
      return JoinedRows<F>(args).all();
    }
  }
#endif
  Tile<F>(args).all();
}

template <class F>
constexpr Kernel kernel{dot<F>, pack<F>, F::kValues, floats_per_block<F>};

}  // namespace
