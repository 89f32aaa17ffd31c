// The dot product of a half-block, whose terms meet in the order that makes its
// bits.
#pragma once

#include <algorithm>
#include <iterator>

#include "cpu/dot/packed_vectors.h"

namespace {

// Whether a format decodes terms p and p + 4 together, so that the terms of two
// quads are met in turn.
template <class F>
constexpr bool kDecodesPairs = requires { requires F::kDecodesPairs; };
template <class F>
constexpr int kQuadsAtOnce = kDecodesPairs<F> ? 2 : 1;

// Whether, on AVX2, half of a half-block's lanes meet one vector before the
// others do, because registers do not hold what decode makes for all.
template <class F>
constexpr bool kHalvesApart = requires { requires F::kHalvesApart; };

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

// One half-block of R rows against M vectors of a panel. `Width` is the
// panel's width, a Constant where the compiler may fold it into addresses. Of
// half of the words (HalfOf) it computes half of the lanes.
template <class F, int R, int M, class Width, class Words = typename F::Words>
struct HalfBlock {
  using V = typename LanesOf<Words>::type;
  const F& format;
  const float* x;
  const Width width;
  Words words[R];
  V acc[R][M];
  V quad[kQuadsAtOnce<F>][R][M];

  GLM_INLINE HalfBlock(const F& f, const float* panel, Width w)
      : format(f), x(panel), width(w) {}

  // Adds all terms.
  GLM_INLINE void sum() {
#if defined(GLM_AVX2)
    if constexpr (kHalvesApart<F> && M == 1) {
      sum_half<0>();
      sum_half<1>();
    } else
#endif
    {
      terms();
    }
    unroll<R>(GLM_EACH(r) {
      unroll<M>(
          GLM_EACH(m) { acc[r][m] = with_nan(format, words[r], acc[r][m]); });
    });
  }
#if defined(GLM_AVX2)
  template <int half>
  GLM_INLINE void sum_half() {
    HalfBlock<F, R, 1, Width, HalfOf<Words, half>> part(
        format, x + half * kHalf / 2, width);
    unroll<R>(GLM_EACH(r) {
      part.words[r] = HalfOf<Words, half>(words[r]);
      part.acc[r][0] = half == 0 ? acc[r][0].a : acc[r][0].b;
    });
    part.terms();
    unroll<R>(GLM_EACH(r) {
      (half == 0 ? acc[r][0].a : acc[r][0].b) = part.acc[r][0];
    });
  }
#endif

  // Term p, of the sum of all or of one of the quads at hand.
  template <int p, int q = 0>
  GLM_INLINE void term() {
    V xs[M];
    unroll<M>(GLM_EACH(m) {
      load(x + (p * width + m) * kHalf, xs[m]);
      if constexpr (R > 1 && M > 1) {
        xs[m] = held(xs[m]);  // one load for all rows
      }
    });
    unroll<R>(GLM_EACH(r) {
      const V d = format.template decode<p>(words[r]);
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

  GLM_INLINE void terms() {
    if constexpr (F::kQuads) {
      constexpr int n = 4 * kQuadsAtOnce<F>;
      for_each_constant<F::kTerms / n>(GLM_EACH(i) { quads<i * n>(); });
    } else {
      for_each_constant<F::kTerms>(GLM_EACH(p) { term<p>(); });
    }
  }
};

}  // namespace
