// Dot products of several vectors with rows so short that the vectors stay in
// the L1 cache. Only dot_body.h includes this.
#pragma once

#if defined(GLM_AVX512)

namespace {

// Sums of the lanes are added up for sixteen rows at a time, since that costs
// as much as it does for four.
template <CpuDecode F>
class ShortRows {
 public:
  static bool takes(const DotArgs& a) {
    constexpr int values = kHalf * F::kValues;
    return a.width > 1 && a.x.size() == 1 && a.k <= kChunk<F> * values;
  }

  GLM_INLINE explicit ShortRows(const DotArgs& args) : a_(args), tile_(args) {
    tile_.x = args.x[0];
  }

  GLM_INLINE void all() const {
    switch (a_.width) {
      case 2:
        return vectors<2, 2>();
      case 4:
        return vectors<2, 4>();
      default:  // no more than one row has its sums in registers
        return vectors<1, 8>();
    }
  }

 private:
  // All rows against M vectors, R at once; the last one is met twice where it
  // is alone.
  template <int R, int M>
  __attribute__((noinline)) void vectors() const {
    F16 sums[M][kHalf];
    for (int row = 0; row < a_.rows; row += kHalf) {
      const int count = std::min(a_.rows - row, kHalf);
      for (int r = 0; r < count; r += R) {
        add_rows<R>(row + r, r + R <= count ? 1 : 0, r, sums);
      }
      for (int m = 0; m < M; m++) {
        float totals[kHalf];
        butterfly_sums(sums[m], totals);
        float* to = a_.y + m * a_.rows + row;
        for (int r = 0; r < count; r++) {
          to[r] = tile_.scales.total(totals[r]);
        }
      }
    }
  }

  template <int R, int M>
  GLM_INLINE void add_rows(int row, int stride, int r, F16 (&sums)[M][kHalf])
      const {
    const int halves = tile_.half_blocks();
    const auto ahead = static_cast<ptrdiff_t>(R * tile_.row_bytes);
    const TileRows rows = tile_.template locate<R>(row, stride);
    for (int odd = 0; odd < 2; odd++) {
      F16 sum[R][M];  // stays in registers
      each<R, M>([&](auto i, auto m) GLM_ALWAYS_INLINE { sum[i][m] = zero(); });
      for (int hb = odd; hb < halves; hb += 2) {
        tile_.template half_block<Either>(
            rows, 0, Constant<M>(), hb, ahead, sum);
      }
      each<R, M>([&](auto i, auto m) GLM_ALWAYS_INLINE {
        F16& both = sums[m][r + i];
        both = odd == 0 ? sum[i][m] : add(both, sum[i][m]);
      });
    }
  }

  // Calls fn(i, m) for each of R rows and M vectors.
  template <int R, int M, class Fn>
  static GLM_INLINE void each(Fn&& fn) {
    unroll<R>(GLM_EACH(i) { unroll<M>(GLM_EACH(m) { fn(i, m); }); });
  }

  const DotArgs& a_;
  Tile<F> tile_;
};

}  // namespace

#endif
