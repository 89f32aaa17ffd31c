// Dot products of one vector with rows that fill half of the lanes: two that
// follow one another are met as one. Only dot_body.h includes this.
#pragma once

#if defined(GLM_AVX512)

namespace {

// kEach rows are one row of the matrix that has as many fewer, whose planes are
// the same bytes.
template <CpuDecode F>
class JoinedRows {
 public:
  // What joining takes: whole lanes, and no bytes between the rows.
  static bool takes(const DotArgs& a) {
    return a.x.size() == 1 && a.width == 1 && a.k == kLanes * F::kValues &&
        a.rows % kHalf == 0 &&
        kEach * a.format.row_bytes(0, a.k) == F::kHalfBytes;
  }

  GLM_INLINE explicit JoinedRows(const DotArgs& a) : a_(a) {
    for (int v = 0; v < vectors_per_half<F>; v++) {
      for (int lane = 0; lane < kHalf; lane++) {
        x_[v * kHalf + lane] = a.x[0][v * kHalf + lane % kLanes];
      }
    }
  }

  GLM_INLINE void all() const {
    DotArgs joined = a_;
    joined.k = kHalf * F::kValues;
    joined.rows = a_.rows / kEach;
    joined.rows_left = a_.rows_left / kEach;
    Tile<F> tile(joined);
    tile.x = x_;
    tile.scales.with_reading([&]<class Reading>(Reading) GLM_ALWAYS_INLINE {
      rows<Reading>(tile, joined.rows);
    });
  }

 private:
  static constexpr int kEach = 2, kLanes = kHalf / kEach;

  template <class Reading>
  void rows(const Tile<F>& tile, int count) const {
    for (int row = 0; row < count; row += kLanes) {
      const TileRows rows = tile.template locate<kLanes>(row, 1);
      F16 sums[kLanes][1], none[kLanes][1];
      unroll<kLanes>(GLM_EACH(r) { sums[r][0] = none[r][0] = zero(); });
      if (rows.direct_halves > 0) {
        tile.template half_block<Reading>(
            rows, 0, Constant<1>(), 0, kAhead, sums);
      } else {
        tile.rest(rows, 0, Constant<1>(), 0, kAhead, sums, none);
      }
      F16 by_lane[kLanes];
      unroll<kLanes>(GLM_EACH(r) { by_lane[r] = sums[r][0]; });
      by_value(by_lane);
      // The lanes without values add zeros, which makes a zero of -0.
      const F16 totals = add(butterfly(by_lane), zero());
      float each[kHalf];
      store(each, totals);
      for (int i = 0; i < kHalf; i++) {
        a_.y[row * kEach + i] = tile.scales.total(each[i]);
      }
    }
  }

  // Sums the lanes of sixteen rows in the order of butterfly_sum.
  static GLM_INLINE F16 butterfly(F16 (&v)[kLanes]) {
    for (int step = kLanes / 2; step > 0; step /= 2) {
      for (int i = 0; i < step; i++) {
        v[i] = add(v[i], v[i + step]);
      }
    }
    return v[0];
  }

  const DotArgs& a_;
  alignas(64) float x_[vectors_per_half<F> * kHalf];
};

}  // namespace

#endif
