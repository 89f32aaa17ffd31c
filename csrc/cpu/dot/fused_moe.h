// moe_decode's stages, whose tiles take the rows of the experts' matrices.
#pragma once

#include <span>
#include <vector>

#include "arrivals.h"
#include "cpu/dot/moe_decode.h"
#include "cpu/dot/panels.h"
#include "cpu/runtime/scratch.h"
#include "cpu/runtime/staged.h"

namespace glm_fused::cpu {

class FusedMoe : public Staged {
 public:
  FusedMoe(const Moe& moe, bool arrivals, Scratch& scratch, int workers);

  // For each chunk of tokens there are kStages.
  int stages() const override;
  Stage begin(int stage) override;
  void tile(int stage, int number, int worker) override;

  // Runs the stages, but computes experts as they come.
  void run_as_they_come(Arrivals& arrivals);

 protected:
  const Moe moe_;
  const int top_k_, workers_;

 private:
  static constexpr int kStages = 4;    // inputs, gate and up, activations, down
  using Batch = std::span<const int>;  // numbers of panels
  using Outputs = float[kMaxPanels * 8 * kMaxTileRows];  // of a group

  static size_t packed(const Matrix& w) {
    return w.kernel->packed_floats(w.k);
  }

  size_t most_tile_values() const;
  void run_tiles(const Stage& stage, TaskRef task) const;
  Stage begin_chunk(int first);
  Stage divide(int n, int k, int groups, double work);
  void take_at_hand(Batch batch);

  Batch group(int number) const {
    const int first = groups_[number];
    return at_hand_.subspan(first, groups_[number + 1] - first);
  }

  Matrix::Rows tile_rows_at(const Matrix& w, int number) const;

  template <class Input>
  void multiply(
      const Matrix& w,
      Batch group,
      int first,
      int rows,
      const Input& input,
      float* out,
      const Matrix::Rows& next) const;

  Batch all_panels() const;
  std::vector<int> distinct_slots() const;
  Batch take(Arrivals& arrivals, std::vector<int>& pending) const;
  double work(Batch batch, int matrices) const;
  Stage begin_inputs();
  void pack_input(int i, float* row) const;
  void project();
  Stage begin_gate_up();
  void gate_up(int number) const;

  float* act(int pair) const {
    return act_.data() + static_cast<size_t>(pair) * moe_.gate.n;
  }
  float* down_input(int i) const {
    return down_packed_.data() + packed(moe_.down) * panels_[i].first;
  }

  Stage begin_pack() const;
  void pack_activations(int i) const;
  void down_rows(
      Batch panels,
      int first,
      int rows,
      float* y,
      size_t stride,
      const Matrix::Rows& next) const;
  void sum_rows(int first, int rows, const float* y, size_t stride) const;
  Stage begin_down();
  void down(int number) const;
  Stage begin_sum();
  void sum(int number) const;
  Stage begin_down_sum();
  void down_sum(int number, int worker) const;

  const bool same_pack_;
  const int most_;              // pairs of a chunk
  int first_ = 0, tokens_ = 0;  // of the chunk at hand
  Batch at_hand_;
  int group_count_ = 0;
  int rows_ = 0, tiles_ = 0;  // of a tile, and of a matrix
  Panels panels_;
  const std::span<int> batch_;
  const std::span<int> groups_;   // their first places in at_hand_
  const std::span<int> packers_;  // the panels whose inputs are packed
  const std::span<float*> gate_inputs_, up_inputs_;  // by panel
  const Shares<float> row_;
  const std::span<float> gate_packed_, up_packed_;
  const std::span<float> act_;  // [pair, intermediate]
  const std::span<float> down_packed_, y_;
  const Shares<float> tile_y_;
};

}  // namespace glm_fused::cpu
