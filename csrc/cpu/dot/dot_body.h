// Dot products of a format's rows with packed vectors. Included by the formats'
// headers, where they are compiled as kernels.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/dot/dot_kernels.h"
#include "cpu/dot/group_scales.h"
#include "cpu/dot/half_block.h"

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
// Long rows of floats, which take hardly a step but the product, are met one by
// one: they come from memory faster as one stream than as four.
#if defined(GLM_AVX512)
template <class F>
constexpr bool kStreamsRows = F::kCarriesAccumulator;
#else
template <class F>
constexpr bool kStreamsRows = false;
#endif
// One vector meets whole rows, so that weights are read in the order of their
// addresses. Those to come are fetched to the L2 cache a group of rows ahead,
// or at least so many bytes, in which time the L3 cache answers.
constexpr ptrdiff_t kAhead = 2048;
// Several vectors meet a few rows chunk by chunk, so that a chunk of them stays
// in the L1 cache: so many rows, and half-blocks of a chunk, which are some
// thirty terms of each vector and parity.
constexpr int kRows = 8;
template <class F>
constexpr int kChunk = 2 * std::max(1, 32 / vectors_per_half<F>);

// Whether a format's scales can be kept: Groups<R> are those of a half-block of
// R rows.
template <class F>
constexpr bool kHasGroups =
    requires { typename F::Scales::template Groups<1>; };

// Whether rows are whole half-blocks, because a block of the format is one.
template <class F>
constexpr bool kWholeRows = requires { requires F::kWholeRows; };

template <CpuDecode F>
struct Tile {
  const DotArgs& a;
  const float* x = nullptr;  // the panel at hand, and where its results go
  float* y = nullptr;
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
    const int last = row + (R - 1) * stride;
    const size_t left = (a.rows_left - last) * row_bytes;
    const size_t readable =
        left < F::Words::kOverread ? 0 : left - F::Words::kOverread;
    rows.whole_halves = rows.direct_halves =
        static_cast<int>(std::min(readable, row_bytes) / F::kHalfBytes);
    scales.template locate<R>(rows, row, stride);
    return rows;
  }

  // Loads half-block `hb` of the rows, with zeros past the end of a row.
  // `ahead` is how far from there the rows' next bytes lie, which go to that
  // level of caches.
  template <class Reading, int level = 2, int R>
  GLM_INLINE void load_half(
      const TileRows& rows,
      int hb,
      ptrdiff_t ahead,
      typename F::Words (&words)[R]) const {
    constexpr size_t whole = F::kHalfBytes;
    const ptrdiff_t stride = rows.weight_stride;
    const uint8_t* half = rows.weight + hb * whole;
    unroll<R>(
        GLM_EACH(r) { prefetch<level>(half + r * stride + ahead, whole); });
    if (Reading::kInPlace || kWholeRows<F> || hb < rows.whole_halves) {
      unroll<R>(GLM_EACH(r) { words[r].load(half + r * stride); });
    } else {
      const size_t left = row_bytes - hb * whole;
      unroll<R>(GLM_EACH(r) {
        load_first<whole>(words[r], half + r * stride, left);
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
    constexpr int level = M == 1 ? 2 : 1;  // of several, they are met next
    load_half<Reading, level>(rows, hb, ahead, block.words);
    unroll<R>(GLM_EACH(r) {
      unroll<M>(GLM_EACH(m) {
        block.acc[r][m] = F::kCarriesAccumulator ? result[r][m] : zero();
      });
    });
    block.sum();
    const float* sums = from + F::kTerms * width * kHalf;
    finish<Reading>(rows, hb, sums, block.acc, result);
  }

  // Turns the sums of half-block `hb` into its part of the result.
  template <class Reading, int R, int M>
  GLM_INLINE void finish(
      const TileRows& rows,
      int hb,
      const float* sums,
      const F16 (&acc)[R][M],
      F16 (&result)[R][M]) const {
    if constexpr (std::is_same_v<Reading, Either> && kHasGroups<F>) {
      typename F::Scales::template Groups<R> groups;
      read_groups(rows, hb, groups);
      groups.finish(sums, acc, result);
    } else {
      scales.template finish<Reading>(rows, hb, sums, acc, result);
    }
  }

  // Reads the scales of half-block `hb`, of formats that keep them.
  template <class Groups>
  GLM_INLINE void read_groups(const TileRows& rows, int hb, Groups& to) const {
    if (hb < rows.direct_halves) {
      scales.with_reading([&]<class Reading>(Reading) GLM_ALWAYS_INLINE {
        scales.template read<Reading>(rows, hb, to);
      });
    } else {
      scales.template read<Anywhere>(rows, hb, to);
    }
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
#if defined(GLM_AVX512) || defined(GLM_AVX2)
    scales.with_reading([&]<class Reading>(Reading) GLM_ALWAYS_INLINE {
      if constexpr (kStreamsRows<F>) {
        if (static_cast<ptrdiff_t>(row_bytes) >= kAhead) {
          return one_vector<1, Reading>(m0, width);
        }
      }
      one_vector<kRowsAtOnce<F>, Reading>(m0, width);
    });
#else
    one_vector<kRowsAtOnce<F>, Either>(m0, width);
#endif
  }

  // All rows against M vectors of a panel, R at once; the last one is taken
  // again where R does not divide the rows.
  template <int R, int M, class Width>
  __attribute__((noinline)) void several_vectors(int m0, Width width) const {
    const int halves = half_blocks();
    const auto next_rows = static_cast<ptrdiff_t>(R * row_bytes);
    for (int row = 0; row < a.rows; row += kRows) {
      const int count = a.rows - row < kRows ? a.rows - row : kRows;
      F16 sums[kRows / R][2][R][M];
      memset(sums, 0, sizeof(sums));
      for (int begin = 0; begin < halves; begin += kChunk<F>) {
        const int end = begin + kChunk<F> < halves ? begin + kChunk<F> : halves;
        // After the last rows: the first ones' next chunk, or the next rows.
        const ptrdiff_t next_chunk = end < halves
            ? kChunk<F> * F::kHalfBytes - (count - 1) / R * next_rows
            : next_rows - begin * F::kHalfBytes;
        for (int r = 0; r < count; r += R) {
          const ptrdiff_t ahead = r + R < count ? next_rows : next_chunk;
          const TileRows rows = locate<R>(row + r, r + R <= count ? 1 : 0);
          add_chunk(rows, m0, width, begin, end, ahead, sums[r / R]);
        }
      }
      for (int r = 0; r < count; r += R) {
        const int some = count - r < R ? count - r : R;
        write<R, M>(row + r, some, m0, sums[r / R][0], sums[r / R][1]);
      }
    }
  }

  // Adds the half-blocks from `begin` on, the even ones first.
  template <int R, int M, class Width>
  GLM_INLINE void add_chunk(
      const TileRows& rows,
      int m0,
      Width width,
      int begin,
      int end,
      ptrdiff_t ahead,
      F16 (&sums)[2][R][M]) const {
    for (int odd = 0; odd < 2; odd++) {
      const auto add_to = [&](F16(&result)[R][M]) GLM_ALWAYS_INLINE {
        for (int hb = begin + odd; hb < end; hb += 2) {
          half_block<Either>(rows, m0, width, hb, ahead, result);
        }
      };
#if defined(GLM_AVX512)  // there are registers for them
      F16 result[R][M];
      unroll<R>(GLM_EACH(r) {
        unroll<M>(GLM_EACH(m) { result[r][m] = sums[odd][r][m]; });
      });
      add_to(result);
      unroll<R>(GLM_EACH(r) {
        unroll<M>(GLM_EACH(m) { sums[odd][r][m] = result[r][m]; });
      });
#else
      add_to(sums[odd]);
#endif
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
    constexpr int n = R * M % 4 == 0 ? 4 : R, each = n / R;  // at once
    for (int m = 0; m < M; m += each) {
      F16 low[n], high[n];
      unroll<n>(GLM_EACH(i) {
        low[i] = even[i % R][m + i / R];
        high[i] = odd[i % R][m + i / R];
      });
      float totals[n];
      butterfly_sums(low, high, totals);
      for (int i = 0; i < each; i++) {
        for (int r = 0; r < count; r++) {
          y[(m0 + m + i) * a.rows + row + r] = scales.total(totals[i * R + r]);
        }
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
        return several_vectors<2, 2>(0, Constant<2>());
      case 4:
        return several_vectors<2, 4>(0, Constant<4>());
      default:
        if constexpr (!F::kQuads) {  // those take DotPanels
          several_vectors<2, 4>(0, Constant<8>());
          several_vectors<2, 4>(4, Constant<8>());
        }
    }
#elif defined(GLM_AVX2)
    if (a.width == 1) {
      return one_vector(0, Constant<1>());
    }
    for (int m = 0; m < a.width; m += 4) {
      several_vectors<1, 4>(m, a.width);
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
#include "cpu/dot/short_panels.h"
#include "cpu/dot/short_rows.h"

namespace {

template <class F>
void dot(const DotArgs& args) {
#if defined(GLM_AVX512) || defined(GLM_AVX2)
  if constexpr (requires { requires F::kJoinsRows; }) {
    if (JoinedRows<F>::takes(args)) {
      return JoinedRows<F>(args).all();
    }
  }
#endif
#if defined(GLM_AVX512)
  if constexpr (!requires { requires F::kLongRows; }) {
    if (ShortRows<F>::takes(args)) {
      return ShortRows<F>(args).all();
    }
  }
  // One panel's vectors meet decoded rows of most formats best four at a time.
  if (args.width == 8 && (F::kQuads || args.x.size() > 1)) {
    constexpr Constant<8> width;
    if constexpr (!requires { requires F::kLongRows; }) {
      if (ShortPanels<F, 4, Constant<8>>::takes(args)) {
        return ShortPanels<F, 4, Constant<8>>(args, width).all();
      }
    }
    return DotPanels<F, 4, Constant<8>>(args, width).all();
  }
#endif
#if defined(GLM_AVX2)
  // Scales of many vectors are better met with four of these at once.
  const bool many = args.width == 8 && args.x.size() > 1;
  if (args.width > 1 && !many) {
    return DotPanels<F, 2, int>(args, args.width).all();
  }
#endif
  Tile<F>(args).all();
}

template <class F>
constexpr Kernel kernel{dot<F>, pack<F>, F::kValues, floats_per_block<F>};

}  // namespace
