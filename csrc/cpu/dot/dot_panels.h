// Dot products of rows with panels of several vectors, as prompts and drafts
// need them. Only dot_body.h includes this.
#pragma once

#include "cpu/dot/panel_terms.h"

#if defined(GLM_AVX512) || defined(GLM_AVX2)

namespace {

// Rows are met chunk by chunk; one of them and of a panel stay in the L1 cache.
template <CpuDecode F, int kVectors, class Width>
class DotPanels : PanelTerms<F, kVectors, Width> {
 public:
  GLM_INLINE DotPanels(const DotArgs& args, Width width) : Base(args, width) {}

  __attribute__((noinline)) void all() {
    const int halves = tile_.half_blocks();
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
  using Base = PanelTerms<F, kVectors, Width>;
  using Base::a_, Base::tile_, Base::width_, Base::terms_;
  using Base::add_half_blocks, Base::decode, Base::panels, Base::sets,
      Base::finish_in, Base::locate;
  using Base::kChunk, Base::kPair, Base::kRows, Base::kMostWidth;
  using typename Base::Sums, typename Base::Terms;
#if defined(GLM_AVX512)
  static constexpr int kFewRows = 16;
#else
  static constexpr int kFewRows = 4;  // against one panel, for the L1 cache
#endif

  void clear(int pairs) {
    for (int pair = 0; pair < pairs; pair++) {
      memset(sums_[pair], 0, panels() * sets() * sizeof(sums_[pair][0]));
    }
  }

  void add_chunk(int row, int begin, int end, int panel, int pair) {
    const TileRows rows = locate(row);
    for (int v = 0; v < sets(); v++) {
      const float* x = a_.x[panel] + v * kVectors * kHalf;
      for (int odd = 0; odd < 2; odd++) {
        add_half_blocks(
            begin + odd,
            end,
            x,
            terms_[pair] + odd,
            sums_[pair][panel * sets() + v][odd],
            finish_in(rows));
      }
    }
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

  Sums sums_[kRows / kPair][kMaxPanels * kMostWidth / kVectors][2];
};

}  // namespace

#endif
