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
        return vectors<2>(0, Constant<2>());
      case 4:
        return vectors<4>(0, Constant<4>());
      default:
        vectors<4>(0, Constant<8>());
        return vectors<4>(4, Constant<8>());
    }
  }

 private:
  static constexpr int kPair = 2;

  // All rows against M vectors, a pair at once; the last one is met twice where
  // it is alone.
  template <int M, class Width>
  __attribute__((noinline)) void vectors(int m0, Width width) const {
    F16 sums[M][kHalf];
    for (int row = 0; row < a_.rows; row += kHalf) {
      const int count = std::min(a_.rows - row, kHalf);
      for (int r = 0; r < count; r += kPair) {
        add_pair(row + r, r + 1 < count ? 1 : 0, m0, width, r, sums);
      }
      for (int m = 0; m < M; m++) {
        float totals[kHalf];
        butterfly_sums(sums[m], totals);
        float* to = a_.y + (m0 + m) * a_.rows + row;
        for (int r = 0; r < count; r++) {
          to[r] = tile_.scales.total(totals[r]);
        }
      }
    }
  }

  template <int M, class Width>
  GLM_INLINE void add_pair(
      int row,
      int stride,
      int m0,
      Width width,
      int r,
      F16 (&sums)[M][kHalf]) const {
    const int halves = tile_.half_blocks();
    const auto ahead = static_cast<ptrdiff_t>(kPair * tile_.row_bytes);
    const TileRows rows = tile_.template locate<kPair>(row, stride);
    for (int odd = 0; odd < 2; odd++) {
      F16 sum[kPair][M];  // stays in registers
      each<M>([&](auto i, auto m) GLM_ALWAYS_INLINE { sum[i][m] = zero(); });
      for (int hb = odd; hb < halves; hb += 2) {
        tile_.template half_block<Either>(rows, m0, width, hb, ahead, sum);
      }
      each<M>([&](auto i, auto m) GLM_ALWAYS_INLINE {
        F16& both = sums[m][r + i];
        both = odd == 0 ? sum[i][m] : add(both, sum[i][m]);
      });
    }
  }

  // Calls fn(i, m) for each row of a pair and each vector.
  template <int M, class Fn>
  static GLM_INLINE void each(Fn&& fn) {
    unroll<kPair>(GLM_EACH(i) { unroll<M>(GLM_EACH(m) { fn(i, m); }); });
  }

  const DotArgs& a_;
  Tile<F> tile_;
};

}  // namespace

#endif
