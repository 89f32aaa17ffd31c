// Dot products of rows with several panels of eight vectors, as prompts need
// them. Only dot_body.h includes this.
#pragma once

#if defined(GLM_AVX512)

namespace {

using glm_fused::cpu::kMaxPanels;

// A few rows are decoded chunk by chunk, once for all panels; a chunk of them
// and of a panel stay in the L1 cache. A row's terms meet a vector's in the
// order of HalfBlock, with kPair rows by kVectors vectors in registers.
template <CpuDecode F>
class DotPanels {
 public:
  GLM_INLINE explicit DotPanels(const DotArgs& args) : a_(args), tile_(args) {}

  __attribute__((noinline)) void all() {
    const int halves = tile_.half_blocks();
    for (int row = 0; row < a_.rows; row += kRows) {
      const int count = a_.rows - row < kRows ? a_.rows - row : kRows;
      const int pairs = (count + kPair - 1) / kPair;
      clear(pairs);
      for (int begin = 0; begin < halves; begin += kChunk) {
        const int end = begin + kChunk < halves ? begin + kChunk : halves;
        for (int pair = 0; pair < pairs; pair++) {
          decode(row + pair * kPair, begin, end, terms_[pair]);
        }
        for (int i = 0; i < panels(); i++) {
          for (int pair = 0; pair < pairs; pair++) {
            add_chunk(row + pair * kPair, begin, end, i, pair);
          }
        }
      }
      for (int i = 0; i < panels(); i++) {
        write(row, count, i);
      }
    }
  }

 private:
  static constexpr int kWidth = 8, kRows = 16, kPair = 2, kVectors = 4;
  static constexpr int kPerHalf = vectors_per_half<F>;
  // Half-blocks of a chunk: some sixteen terms of each vector and parity.
  static constexpr int kChunk = 2 * (kPerHalf < 18 ? 18 / kPerHalf : 1);

  using Terms = F16[kPair];
  using Sums = F16[kPair][kVectors];

  int panels() const {
    return static_cast<int>(a_.x.size());
  }

  void clear(int pairs) {
    for (int i = 0; i < panels(); i++) {
      memset(sums_[i], 0, pairs * sizeof(sums_[i][0]));
    }
  }

  // The pair's rows; one that is not there is the last one again.
  GLM_INLINE TileRows locate(int row) const {
    return tile_.template locate<kPair>(row, row + 1 < a_.rows ? 1 : 0);
  }

  // Decodes a chunk of a pair of rows, and asks for that of the rows that the
  // next turn takes.
  void decode(int row, int begin, int end, Terms (*to)[F::kTerms]) const {
    const TileRows rows = locate(row);
    const auto ahead = static_cast<ptrdiff_t>(kRows * tile_.row_bytes);
    for (int hb = begin; hb < end; hb++) {
      typename F::Words words[kPair];
      tile_.template load_half<Anywhere>(rows, hb, ahead, words);
      for_each_constant<F::kTerms>(GLM_EACH(p) {
        unroll<kPair>(GLM_EACH(r) {
          to[hb - begin][p][r] = tile_.format.template decode<p>(words[r]);
        });
      });
      unroll<kPair>(GLM_EACH(r) {
        F16& first = to[hb - begin][0][r];
        first = with_nan(tile_.format, words[r], first);
      });
    }
  }

  void add_chunk(int row, int begin, int end, int panel, int pair) {
    const TileRows rows = locate(row);
    if constexpr (!F::kCarriesAccumulator) {  // there are scales to read
      if (end <= rows.direct_halves) {
        tile_.scales.with_reading([&]<class Reading>(Reading) {
          add_chunk<Reading>(rows, begin, end, panel, pair);
        });
        return;
      }
    }
    add_chunk<Anywhere>(rows, begin, end, panel, pair);
  }

  template <class Reading>
  void
  add_chunk(const TileRows& rows, int begin, int end, int panel, int pair) {
    for (int v = 0; v < kWidth / kVectors; v++) {
      const float* x = a_.x[panel] + v * kVectors * kHalf;
      for (int odd = 0; odd < 2; odd++) {
        add_half_blocks<Reading>(
            rows,
            begin + odd,
            end,
            x,
            terms_[pair] + odd,
            sums_[panel][pair][v][odd]);
      }
    }
  }

  // Adds every other half-block from `hb` on.
  template <class Reading>
  GLM_INLINE void add_half_blocks(
      const TileRows& rows,
      int hb,
      int end,
      const float* panel,
      const Terms (*terms)[F::kTerms],
      Sums& sums) const {
    Sums result;
    each([&](auto r, auto m) GLM_ALWAYS_INLINE { result[r][m] = sums[r][m]; });
    for (; hb < end; hb += 2, terms += 2) {
      const float* x =
          panel + static_cast<size_t>(hb) * kPerHalf * kWidth * kHalf;
      Sums acc;
      each([&](auto r, auto m) GLM_ALWAYS_INLINE {
        acc[r][m] = F::kCarriesAccumulator ? result[r][m] : zero();
      });
      if constexpr (F::kQuads) {
        unroll<F::kTerms / 4>(GLM_EACH(q) {
          add_quad(x + q * 4 * kWidth * kHalf, *terms + q * 4, acc);
        });
      } else {
        unroll<F::kTerms>(GLM_EACH(p) {
          add_term(x + p * kWidth * kHalf, (*terms)[p], acc);
        });
      }
      const float* sums_of_x = x + F::kTerms * kWidth * kHalf;
      tile_.scales.template finish<Reading>(rows, hb, sums_of_x, acc, result);
    }
    each([&](auto r, auto m) GLM_ALWAYS_INLINE { sums[r][m] = result[r][m]; });
  }

  static GLM_INLINE void add_term(const float* x, const Terms& d, Sums& acc) {
    F16 xs[kVectors];
    unroll<kVectors>(GLM_EACH(m) { xs[m] = held(load(x + m * kHalf)); });
    unroll<kPair>(GLM_EACH(r) {
      const F16 w = held(d[r]);
      unroll<kVectors>(
          GLM_EACH(m) { acc[r][m] = held(fma(xs[m], w, acc[r][m])); });
    });
  }

  // fma(g,h, fma(e,f, fma(a,b, c*d))), as HalfBlock does.
  static GLM_INLINE void add_quad(const float* x, const Terms* d, Sums& acc) {
    constexpr int step = kWidth * kHalf;
    Sums quad;
    F16 xs[kVectors];
    unroll<kVectors>(GLM_EACH(m) { xs[m] = held(load(x + step + m * kHalf)); });
    unroll<kPair>(GLM_EACH(r) {
      const F16 w = held(d[1][r]);
      unroll<kVectors>(GLM_EACH(m) { quad[r][m] = held(mul(xs[m], w)); });
    });
    add_term(x, d[0], quad);
    add_term(x + 2 * step, d[2], quad);
    add_term(x + 3 * step, d[3], quad);
    each([&](auto r, auto m) GLM_ALWAYS_INLINE {
      acc[r][m] = held(add(acc[r][m], quad[r][m]));
    });
  }

  // Calls fn(r, m) for each row and vector in registers.
  template <class Fn>
  static GLM_INLINE void each(Fn&& fn) {
    unroll<kPair>(GLM_EACH(r) { unroll<kVectors>(GLM_EACH(m) { fn(r, m); }); });
  }

  // Stores the sums of `count` rows.
  void write(int row, int count, int panel) const {
    for (int m = 0; m < kWidth; m++) {
      float* y = a_.y + (panel * kWidth + m) * a_.rows + row;
      for (int first = 0; first < count; first += 4) {
        F16 low[4], high[4];
        unroll<4>(GLM_EACH(r) {
          const auto& both = sums_[panel][(first + r) / kPair][m / kVectors];
          low[r] = both[0][r % kPair][m % kVectors];
          high[r] = both[1][r % kPair][m % kVectors];
        });
        float totals[4];
        butterfly_sums(low, high, totals);
        for (int r = 0; r < 4 && first + r < count; r++) {
          y[first + r] = tile_.scales.total(totals[r]);
        }
      }
    }
  }

  const DotArgs& a_;
  const Tile<F> tile_;
  Terms terms_[kRows / kPair][kChunk][F::kTerms];
  Sums sums_[kMaxPanels][kRows / kPair][kWidth / kVectors][2];
};

}  // namespace

#endif
