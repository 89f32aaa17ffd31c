// Dot products of one vector with rows of GGUF's formats whose grid does not
// fit registers. Only gguf_kernels_body.h includes this.
#pragma once

namespace {

// Integer units look words up in memory while vector units multiply, a few
// between two terms: with those of a half-block in a row, either would wait for
// the other. That is done two half-blocks ahead, and indices are stored three
// ahead, so that what is loaded has long been stored.
template <Family family>
class LookedUpRows {
 public:
  static bool takes(const DotArgs& a) {
    return a.width == 1 && a.rows >= kEach && a.k > kFoundAhead * kHalfColumns;
  }

  GLM_INLINE explicit LookedUpRows(const DotArgs& a) : tile_(a) {}

  GLM_INLINE void all() {
    for (size_t i = 0; i < tile_.a.x.size(); i++) {
      tile_.x = tile_.a.x[i];
      tile_.y = tile_.a.y + i * tile_.a.rows;
      rows();
    }
  }

 private:
  using Blocks = GgufBlocks<family>;
  using Codes = LaneCodes<family>;
  static constexpr int kEach = 4, kFoundAhead = 2;
  static constexpr ptrdiff_t kBytes = Blocks::kHalfBytes;
  struct alignas(64) Indices {
    uint16_t of[kWordsPerHalf];
  };
  // Of the first and of the second eight columns of each lane.
  struct alignas(64) Words {
    uint32_t of[2][kHalf];
  };
  using Sums = F16[kEach][1];

  __attribute__((noinline)) void rows() {
    const int last = tile_.a.rows - kEach;
    const auto group = static_cast<ptrdiff_t>(kEach * tile_.row_bytes);
    const ptrdiff_t ahead = (kAhead + group - 1) / group * group;
    start();
    // The last rows overlap those before.
    for (int row = 0; row < tile_.a.rows; row += kEach) {
      const int first = std::min(row, last);
      const TileRows rows = tile_.template locate<kEach>(first, 1);
      const int halves = rows.direct_halves;
      const ptrdiff_t to_next =
          (std::min(row + kEach, last) - first) * rows.weight_stride -
          halves * kBytes;
      Sums even, odd;
      unroll_each<kEach>(GLM_EACH(r) { even[r][0] = odd[r][0] = zero(); });
      const auto add = [&](int hb, Sums& sums) GLM_ALWAYS_INLINE {
        const int later = hb + kFoundAhead + 1;
        const ptrdiff_t at = later * kBytes;
        half_block(rows, hb, ahead, later < halves ? at : at + to_next, sums);
      };
      int hb = 0;
      for (; hb + 1 < halves; hb += 2) {
        add(hb, even);
        add(hb + 1, odd);
      }
      if (hb < halves) {
        add(hb, even);
      }
      tile_.template write<kEach, 1>(first, kEach, 0, even, odd);
    }
  }

  // Looks up what the first half-blocks need, and stores indices of the next.
  GLM_INLINE void start() {
    const uint8_t* half = tile_.a.planes[0];
    store_indices(half);
    for (Words(&found)[kEach] : found_) {
      for_each_constant<Blocks::kTerms>(GLM_EACH(p) { look_up<p>(found); });
      store_indices(half += kBytes);
    }
    turn_ = 0;
  }

  // Adds half-block `hb` of the rows to the sums; `later` is where from the
  // rows' first byte the half-block lies whose indices are next.
  GLM_INLINE void half_block(
      const TileRows& rows,
      int hb,
      ptrdiff_t ahead,
      ptrdiff_t later,
      Sums& sums) {
    const float* from = tile_.x + hb * Blocks::kTerms * kHalf;
    HalfBlock<Blocks, kEach, 1, Constant<1>> block(tile_.format, from, {});
    Words(&found)[kEach] = found_[turn_];
    unroll_each<kEach>(GLM_EACH(r) {
      const uint8_t* half = rows.weight + hb * kBytes + r * rows.weight_stride;
      prefetch(half + ahead, kBytes);
      U16(&w)[2] = block.words[r].w;
      unroll_each<2>(GLM_EACH(i) { w[i] = load_words(found[r].of[i]); });
      Codes::finish(half, w);
      block.acc[r][0] = zero();
    });
    for_each_constant<Blocks::kTerms>(GLM_EACH(p) {
      block.template term<p>();
      look_up<p>(found);
    });
    tile_.scales.template finish<InPlace<0>>(
        rows, hb, nullptr, block.acc, sums);
    store_indices(rows.weight + later);
    turn_ = (turn_ + 1) % kFoundAhead;
  }

  GLM_INLINE void store_indices(const uint8_t* half) {
    const auto stride = static_cast<ptrdiff_t>(tile_.row_bytes);
    unroll_each<kEach>(GLM_EACH(r) {
      _mm512_store_si512(indices_[r].of, Codes::index(half + r * stride));
      // A compiler would take them from the register, one by one.
      __asm__("" : "+m"(indices_[r]));
    });
  }
  static GLM_INLINE uint32_t row_of_grid(uint32_t index) {
    uint32_t word = Codes::grid.of[index];
    // A compiler would gather several in a register.
    __asm__("" : "+r"(word));
    return word;
  }
  // Both words of a sixteenth of the lanes, whose indices are loaded at once:
  // a core does three loads and stores a cycle, but six instructions.
  template <int p>
  GLM_INLINE void look_up(Words (&found)[kEach]) {
    constexpr int row = p / 4, first = p % 4 * 4;
    unroll_each<4>(GLM_EACH(i) {
      const int lane = first + i;
      uint32_t both;
      memcpy(&both, indices_[row].of + 2 * lane, sizeof(both));
      __asm__("" : "+r"(both));
      found[row].of[0][lane] = row_of_grid(both & 0xffff);
      found[row].of[1][lane] = row_of_grid(both >> 16);
    });
  }

  Tile<Blocks> tile_;
  Indices indices_[kEach];
  Words found_[kFoundAhead][kEach];
  int turn_ = 0;
};

}  // namespace
