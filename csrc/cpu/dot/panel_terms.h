// What dot products of rows with several panels have in common. Only dot_body.h
// includes this.
#pragma once

#if defined(GLM_AVX512) || defined(GLM_AVX2)

namespace {

using glm_fused::cpu::kMaxPanels;

// A chunk of a few rows is decoded once for all panels, and a row's terms meet
// a vector's in the order of HalfBlock, with kPair rows by kVectors vectors in
// registers; where one register holds half of the lanes, these are met first.
template <CpuDecode F, int kVectors, class Width>
class PanelTerms {
 protected:
  GLM_INLINE PanelTerms(const DotArgs& args, Width width)
      : a_(args), tile_(args), width_(width) {}

#if defined(GLM_AVX512)
  using V = F16;
#else
  using V = F8;
#endif
  static constexpr int kParts = sizeof(F16) / sizeof(V);
  static constexpr int kPartLanes = kHalf / kParts;
  static constexpr int kRows = 16, kPair = 2, kMostWidth = 8;
  static constexpr int kQuads = kInterleaves<F> ? 2 : 1;  // at once
  static constexpr int kPerHalf = vectors_per_half<F>;
  // Half-blocks of a chunk: some sixteen terms of each vector and parity.
  static constexpr int kChunk = 2 * (kPerHalf < 18 ? 18 / kPerHalf : 1);

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

  // Finishes half-blocks of these rows.
  GLM_INLINE auto finish_in(const TileRows& rows) const {
    return [&](int hb, const float* sums, auto& acc, auto& result)
               GLM_ALWAYS_INLINE {
                 tile_.template finish<Either>(rows, hb, sums, acc, result);
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
      for_each_constant<kParts>(GLM_EACH(i) {
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

  const DotArgs& a_;
  const Tile<F> tile_;
  const Width width_;
  Terms terms_[kRows / kPair][kChunk][F::kTerms];
};

}  // namespace

#endif
