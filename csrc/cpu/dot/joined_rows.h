// Dot products of one or two vectors with rows that fill half of the lanes: two
// that follow one another are met as one. Only dot_body.h includes this.
#pragma once

#if defined(GLM_AVX512) || defined(GLM_AVX2)

namespace {

// kEach rows are one row of the matrix that has as many fewer, whose planes are
// the same bytes.
template <CpuDecode F>
class JoinedRows {
 public:
  // What joining takes: whole lanes, and no bytes between the rows. Each vector
  // meets the rows alone, so that more are better met together.
  static bool takes(const DotArgs& a) {
    return a.x.size() == 1 && a.width <= 2 && a.k == kLanes * F::kValues &&
        a.rows % kHalf == 0 &&
        kEach * a.format.row_bytes(0, a.k) == F::kHalfBytes;
  }

  GLM_INLINE explicit JoinedRows(const DotArgs& a) : a_(a) {}

  GLM_INLINE void all() {
    DotArgs joined = a_;
    joined.k = kHalf * F::kValues;
    joined.rows = a_.rows / kEach;
    joined.rows_left = a_.rows_left / kEach;
    Tile<F> tile(joined);
    tile.x = x_;
    for (int m = 0; m < a_.width; m++) {
      take(m);
      rows(tile, joined.rows, a_.y + m * a_.rows);
    }
  }

 private:
  static constexpr int kEach = 2, kLanes = kHalf / kEach;
#if defined(GLM_AVX512)
  static constexpr int kAtOnce = kLanes;
#else
  static constexpr int kAtOnce =
      kRowsAtOnce<F>;  // for which there are registers
#endif

  // Lays vector m out for both rows.
  void take(int m) {
    for (int v = 0; v < vectors_per_half<F>; v++) {
      const float* from = a_.x[0] + (v * a_.width + m) * kHalf;
      for (int lane = 0; lane < kHalf; lane++) {
        x_[v * kHalf + lane] = from[lane % kLanes];
      }
    }
  }

  void rows(const Tile<F>& tile, int count, float* y) const {
    for (int row = 0; row < count; row += kLanes) {
      F16 by_lane[kLanes];
      for (int first = 0; first < kLanes; first += kAtOnce) {
        some(tile, row + first, by_lane + first);
      }
      by_value(by_lane);
      // The lanes without values add zeros, which makes a zero of -0.
      const F16 totals = add(butterfly(by_lane), zero());
      float each[kHalf];
      store(each, totals);
      for (int i = 0; i < kHalf; i++) {
        y[row * kEach + i] = tile.scales.total(each[i]);
      }
    }
  }

  // The lanes' sums of kAtOnce joined rows.
  static GLM_INLINE void some(const Tile<F>& tile, int row, F16* to) {
    const TileRows rows = tile.template locate<kAtOnce>(row, 1);
    F16 sums[kAtOnce][1];
    unroll<kAtOnce>(GLM_EACH(r) { sums[r][0] = zero(); });
    tile.template half_block<Either>(rows, 0, Constant<1>(), 0, kAhead, sums);
    unroll<kAtOnce>(GLM_EACH(r) { to[r] = sums[r][0]; });
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
