// Dot products of rows with panels of several vectors, as prompts and drafts
// need them. Only dot_body.h includes this.
#pragma once

#if defined(GLM_AVX512) || defined(GLM_AVX2)

namespace {

using glm_fused::cpu::kMaxPanels;

template <class F, int R>
struct KeptGroups {
  struct type {};
};
template <class F, int R>
  requires requires { typename F::Scales::template Groups<R>; }
struct KeptGroups<F, R> {
  using type = typename F::Scales::template Groups<R>;
};

// A few rows are decoded chunk by chunk, once for all panels; a chunk of them
// and of a panel stay in the L1 cache. A row's terms meet a vector's in the
// order of HalfBlock, with kPair rows by kVectors vectors in registers; where
// one register holds half of the lanes, these are met first.
template <CpuDecode F, int kVectors, class Width>
class DotPanels {
 public:
  GLM_INLINE DotPanels(const DotArgs& args, Width width)
      : a_(args), tile_(args), width_(width) {}

  __attribute__((noinline)) void all() {
    const int halves = tile_.half_blocks();
#if defined(GLM_AVX512)
    if constexpr (!requires { requires F::kLongRows; }) {
      if (halves <= kChunk) {
        return short_rows(halves);
      }
    }
#endif
    const int most = panels() == 1 ? kFewRows : kRows;
    for (int row = 0; row < a_.rows; row += most) {
      const int count = a_.rows - row < most ? a_.rows - row : most;
      const int pairs = (count + kPair - 1) / kPair;
      clear(pairs);
      for (int begin = 0; begin < halves; begin += kChunk) {
        const int end = begin + kChunk < halves ? begin + kChunk : halves;
        for (int pair = 0; pair < pairs; pair++) {
          decode(row + pair * kPair, begin, end, most, terms_[pair]);
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
#if defined(GLM_AVX512)
  using V = F16;
  static constexpr int kFewRows = 16;
#else
  using V = F8;
  static constexpr int kFewRows = 4;  // against one panel, for the L1 cache
#endif
  static constexpr int kParts = sizeof(F16) / sizeof(V);
  static constexpr int kPartLanes = kHalf / kParts;
  static constexpr int kRows = 16, kPair = 2, kMostWidth = 8;
  static constexpr int kQuads = kInterleaves<F> ? 2 : 1;  // at once
  static constexpr int kPerHalf = vectors_per_half<F>;
  // Half-blocks of a chunk: some sixteen terms of each vector and parity.
  static constexpr int kChunk = 2 * (kPerHalf < 18 ? 18 / kPerHalf : 1);

  // Whether what scales give for a half-block can be kept beside its terms.
  static constexpr bool kKeepsGroups =
      requires { typename F::Scales::template Groups<kPair>; };

  using Terms = F16[kPair];
  using Sums = F16[kPair][kVectors];
  using Parts = V[kPair][kVectors];

  int panels() const {
    return static_cast<int>(a_.x.size());
  }

  // Of each panel, the sets of kVectors that share registers.
  int sets() const {
    return width_ / kVectors;
  }

  void clear(int pairs) {
    for (int pair = 0; pair < pairs; pair++) {
      memset(sums_[pair], 0, panels() * sets() * sizeof(sums_[pair][0]));
    }
  }

#if defined(GLM_AVX512)
  // Of rows that are one chunk, sums stay in registers until lanes are added
  // up, for sixteen rows at a time.
  void short_rows(int halves) {
    static_assert(kRows == kHalf);
    for (int row = 0; row < a_.rows; row += kRows) {
      const int count = a_.rows - row < kRows ? a_.rows - row : kRows;
      const int pairs = (count + kPair - 1) / kPair;
      for (int pair = 0; pair < pairs; pair++) {
        decode(row + pair * kPair, 0, halves, kRows, terms_[pair]);
        read_groups(row + pair * kPair, halves, pair);
      }
      for (int i = 0; i < panels(); i++) {
        for (int v = 0; v < sets(); v++) {
          const float* x = a_.x[i] + v * kVectors * kHalf;
          F16 sums[kVectors][kRows];
          for (int pair = 0; pair < pairs; pair++) {
            sum_pair(row + pair * kPair, halves, x, pair, sums);
          }
          write_short(row, count, i * width_ + v * kVectors, sums);
        }
      }
    }
  }

  void read_groups(int row, int halves, int pair) {
    if constexpr (kKeepsGroups) {
      with_reading(row, halves, [&]<class Reading>(const TileRows& rows) {
        for (int hb = 0; hb < halves; hb++) {
          tile_.scales.template read<Reading>(rows, hb, groups_[pair][hb]);
        }
      });
    }
  }

  void sum_pair(
      int row,
      int halves,
      const float* x,
      int pair,
      F16 (&to)[kVectors][kRows]) const {
    if constexpr (kKeepsGroups) {
      const auto& groups = groups_[pair];
      const auto finish =
          [&](int hb, const float* sums, auto& acc, auto& result)
              GLM_ALWAYS_INLINE { groups[hb].finish(sums, acc, result); };
      sum_pair(halves, x, pair, to, finish);
    } else {
      with_reading(row, halves, [&]<class Reading>(const TileRows& rows) {
        sum_pair(halves, x, pair, to, finish_in<Reading>(rows));
      });
    }
  }

  template <class Finish>
  __attribute__((noinline)) void sum_pair(
      int halves,
      const float* x,
      int pair,
      F16 (&to)[kVectors][kRows],
      const Finish& finish) const {
    Sums even, odd;
    each([&](auto r, auto m)
             GLM_ALWAYS_INLINE { even[r][m] = odd[r][m] = zero(); });
    add_half_blocks(0, halves, x, terms_[pair], even, finish);
    add_half_blocks(1, halves, x, terms_[pair] + 1, odd, finish);
    each([&](auto r, auto m) GLM_ALWAYS_INLINE {
      to[m][pair * kPair + r] = add(even[r][m], odd[r][m]);
    });
  }

  // Stores the sums of `count` rows and the vectors from m on.
  void write_short(
      int row,
      int count,
      int m,
      const F16 (&sums)[kVectors][kRows]) const {
    for (const auto& of_vector : sums) {
      float totals[kRows];
      butterfly_sums(of_vector, totals);
      for (float& total : totals) {
        total = tile_.scales.total(total);
      }
      memcpy(a_.y + m++ * a_.rows + row, totals, count * sizeof(float));
    }
  }
#endif

  // The pair's rows; one that is not there is the last one again.
  GLM_INLINE TileRows locate(int row) const {
    return tile_.template locate<kPair>(row, row + 1 < a_.rows ? 1 : 0);
  }

  // Decodes a chunk of a pair of rows, and asks for that of the rows that the
  // next turn takes.
  void decode(int row, int begin, int end, int turn, Terms (*to)[F::kTerms])
      const {
    const TileRows rows = locate(row);
    const auto ahead = static_cast<ptrdiff_t>(turn * tile_.row_bytes);
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
    with_reading(row, end, [&]<class Reading>(const TileRows& rows) {
      add_chunk<Reading>(rows, begin, end, panel, pair);
    });
  }

  // Calls fn with how scales are read before half-block `end` of a pair of rows
  // from `row` on, and with those.
  template <class Fn>
  void with_reading(int row, int end, const Fn& fn) const {
    const TileRows rows = locate(row);
    if constexpr (!F::kCarriesAccumulator) {  // there are scales to read
      if (end <= rows.direct_halves) {
        tile_.scales.with_reading([&]<class Reading>(Reading) {
          fn.template operator()<Reading>(rows);
        });
        return;
      }
    }
    fn.template operator()<Anywhere>(rows);
  }

  template <class Reading>
  void
  add_chunk(const TileRows& rows, int begin, int end, int panel, int pair) {
    for (int v = 0; v < sets(); v++) {
      const float* x = a_.x[panel] + v * kVectors * kHalf;
      for (int odd = 0; odd < 2; odd++) {
        add_half_blocks(
            begin + odd,
            end,
            x,
            terms_[pair] + odd,
            sums_[pair][panel * sets() + v][odd],
            finish_in<Reading>(rows));
      }
    }
  }

  // Finishes half-blocks of these rows.
  template <class Reading>
  GLM_INLINE auto finish_in(const TileRows& rows) const {
    return [&](int hb, const float* sums, auto& acc, auto& result)
               GLM_ALWAYS_INLINE {
                 tile_.scales.template finish<Reading>(
                     rows, hb, sums, acc, result);
               };
  }

  // Adds every other half-block from `hb` on.
  template <class Finish>
  GLM_INLINE void add_half_blocks(
      int hb,
      int end,
      const float* panel,
      const Terms (*terms)[F::kTerms],
      Sums& sums,
      const Finish& finish) const {
    const int step = width_ * kHalf;  // from a term to the next
    Sums result;
    each([&](auto r, auto m) GLM_ALWAYS_INLINE { result[r][m] = sums[r][m]; });
    for (; hb < end; hb += 2, terms += 2) {
      const float* x = panel + static_cast<size_t>(hb) * kPerHalf * step;
      Sums acc;
      each([&](auto r, auto m) GLM_ALWAYS_INLINE {
        acc[r][m] = F::kCarriesAccumulator ? result[r][m] : zero();
      });
      unroll<kParts>(GLM_EACH(i) {
        Parts part;
        each([&](auto r, auto m)
                 GLM_ALWAYS_INLINE { part[r][m] = part_of<i>(acc[r][m]); });
        add_terms<i>(x, step, *terms, part);
        each([&](auto r, auto m)
                 GLM_ALWAYS_INLINE { part_of<i>(acc[r][m]) = part[r][m]; });
      });
      finish(hb, x + F::kTerms * step, acc, result);
    }
    each([&](auto r, auto m) GLM_ALWAYS_INLINE { sums[r][m] = result[r][m]; });
  }

  template <int i>
  static GLM_INLINE V& part_of(F16& all) {
#if defined(GLM_AVX512)
    return all;
#else
    return i == 0 ? all.a : all.b;
#endif
  }
  template <int i>
  static GLM_INLINE V part_of(const F16& all) {
    return part_of<i>(const_cast<F16&>(all));
  }

  // Adds all terms of the lanes of part i.
  template <int i>
  static GLM_INLINE void
  add_terms(const float* x, int step, const Terms* d, Parts& acc) {
    x += i * kPartLanes;
    if constexpr (F::kQuads) {
      unroll<F::kTerms / 4 / kQuads>(GLM_EACH(q) {
        add_quads<i>(x, step, d + q * 4 * kQuads, acc);
        x += 4 * kQuads * step;
      });
    } else {
      unroll<F::kTerms>(GLM_EACH(p) {
        add_term<i>(x, d[p], acc);
        x += step;
      });
    }
  }

  static GLM_INLINE V vector_at(const float* p) {
    V v;
    load(p, v);
    return v;
  }

  template <int i>
  static GLM_INLINE void add_term(const float* x, const Terms& d, Parts& acc) {
    V xs[kVectors];
    unroll<kVectors>(GLM_EACH(m) { xs[m] = held(vector_at(x + m * kHalf)); });
    unroll<kPair>(GLM_EACH(r) {
      const V w = held(part_of<i>(d[r]));
      unroll<kVectors>(
          GLM_EACH(m) { acc[r][m] = held(fma(xs[m], w, acc[r][m])); });
    });
  }

  // fma(g,h, fma(e,f, fma(a,b, c*d))), as HalfBlock does.
  template <int i>
  static GLM_INLINE void
  add_quads(const float* x, int step, const Terms* d, Parts& acc) {
    Parts quads[kQuads];
    unroll<kQuads>(GLM_EACH(q) {
      start_quad<i>(x + q * 4 * step, step, d + q * 4, quads[q]);
    });
    if constexpr (kInterleaves<F>) {
      each([&](auto r, auto m) GLM_ALWAYS_INLINE {
        separate_lanes(quads[0][r][m], quads[1][r][m]);
      });
    }
    unroll<kQuads>(GLM_EACH(q) {
      each([&](auto r, auto m) GLM_ALWAYS_INLINE {
        acc[r][m] = held(add(acc[r][m], quads[q][r][m]));
      });
    });
  }

  template <int i>
  static GLM_INLINE void
  start_quad(const float* x, int step, const Terms* d, Parts& quad) {
    V xs[kVectors];
    unroll<kVectors>(
        GLM_EACH(m) { xs[m] = held(vector_at(x + step + m * kHalf)); });
    unroll<kPair>(GLM_EACH(r) {
      const V w = held(part_of<i>(d[1][r]));
      unroll<kVectors>(GLM_EACH(m) { quad[r][m] = held(mul(xs[m], w)); });
    });
    add_term<i>(x, d[0], quad);
    add_term<i>(x + 2 * step, d[2], quad);
    add_term<i>(x + 3 * step, d[3], quad);
  }

  // Calls fn(r, m) for each row and vector in registers.
  template <class Fn>
  static GLM_INLINE void each(Fn&& fn) {
    unroll<kPair>(GLM_EACH(r) { unroll<kVectors>(GLM_EACH(m) { fn(r, m); }); });
  }

  // Stores the sums of `count` rows.
  void write(int row, int count, int panel) const {
    for (int m = 0; m < width_; m++) {
      float* y = a_.y + (panel * width_ + m) * a_.rows + row;
      for (int first = 0; first < count; first += 4) {
        F16 low[4], high[4];
        unroll<4>(GLM_EACH(r) {
          const auto& both =
              sums_[(first + r) / kPair][panel * sets() + m / kVectors];
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
  const Width width_;
  Terms terms_[kRows / kPair][kChunk][F::kTerms];
  Sums sums_[kRows / kPair][kMaxPanels * kMostWidth / kVectors][2];
  KeptGroups<F, kPair>::type groups_[kRows / kPair][kChunk];
};

}  // namespace

#endif
