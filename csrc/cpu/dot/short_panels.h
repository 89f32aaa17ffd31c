// Dot products of several panels with rows that are one chunk. Only dot_body.h
// includes this.
#pragma once

#include "cpu/dot/panel_terms.h"

#if defined(GLM_AVX512)

namespace {

template <class F, int R>
struct KeptGroups {
  struct type {};
};
template <class F, int R>
  requires requires { typename F::Scales::template Groups<R>; }
struct KeptGroups<F, R> {
  using type = typename F::Scales::template Groups<R>;
};

// Sums stay in registers until their lanes are added up, for sixteen rows at a
// time, and what scales give is kept beside decoded terms.
template <CpuDecode F, int kVectors, class Width>
class ShortPanels : PanelTerms<F, kVectors, Width> {
 public:
  static bool takes(const DotArgs& a) {
    return a.k <= kChunk * kHalf * F::kValues;
  }

  GLM_INLINE ShortPanels(const DotArgs& args, Width width)
      : Base(args, width) {}

  __attribute__((noinline)) void all() {
    const int halves = tile_.half_blocks();
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
          write(row, count, i * width_ + v * kVectors, sums);
        }
      }
    }
  }

 private:
  using Base = PanelTerms<F, kVectors, Width>;
  using Base::a_, Base::tile_, Base::width_, Base::terms_;
  using Base::add_half_blocks, Base::decode, Base::each, Base::panels,
      Base::finish_in, Base::locate, Base::sets;
  using Base::kChunk, Base::kPair, Base::kRows;
  using typename Base::Sums;
  static_assert(kRows == kHalf);

  using Groups = KeptGroups<F, kPair>::type;
  // Whether what scales give for a half-block can be kept.
  static constexpr bool kKeepsGroups = kHasGroups<F>;

  void read_groups(int row, int halves, int pair) {
    if constexpr (kKeepsGroups) {
      const TileRows rows = locate(row);
      const auto read = [&]<class Reading>(Reading) {
        for (int hb = 0; hb < halves; hb++) {
          tile_.scales.template read<Reading>(rows, hb, groups_[pair][hb]);
        }
      };
      if (halves <= rows.direct_halves) {
        tile_.scales.with_reading(read);
      } else {
        read(Anywhere());
      }
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
      sum_pair(halves, x, pair, to, finish_in(locate(row)));
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
  void write(int row, int count, int m, const F16 (&sums)[kVectors][kRows])
      const {
    for (const auto& of_vector : sums) {
      float totals[kRows];
      butterfly_sums(of_vector, totals);
      for (float& total : totals) {
        total = tile_.scales.total(total);
      }
      memcpy(a_.y + m++ * a_.rows + row, totals, count * sizeof(float));
    }
  }

  Groups groups_[kRows / kPair][kChunk];
};

}  // namespace

#endif
