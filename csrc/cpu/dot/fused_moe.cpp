#include "cpu/dot/fused_moe.h"

#include <algorithm>
#include <numeric>

#include "cpu/dot/dot_kernels.h"

namespace glm_fused::cpu {

namespace {

// This many tokens are taken together, which bounds the scratch memory of a
// long prefill.
constexpr int kMaxTokens = 512;
// A task holds kMaxValues of the choices' outputs, or more where there are so
// many choices that kMinTile rows of each are more.
constexpr int kMaxValues = 1 << 16, kMinTile = 128;
// Fewer values are packed at once, which leaves no tiles.
constexpr double kFewInputs = 1 << 13, kFewActivations = 1 << 15;

}  // namespace

FusedMoe::FusedMoe(const Moe& moe, bool arrivals, Scratch& scratch, int workers)
    : moe_(moe),
      top_k_(moe.slots.shape(1)),
      workers_(workers),
      same_pack_(moe.up.kernel->pack == moe.gate.kernel->pack),
      most_(std::min(kMaxTokens, moe.x.shape(0)) * top_k_),
      panels_(most_, top_k_, scratch),
      batch_(scratch.take<int>(most_)),
      groups_(scratch.take<int>(most_ + 1)),
      packers_(scratch.take<int>(most_)),
      gate_inputs_(scratch.take<float*>(most_)),
      up_inputs_(scratch.take<float*>(most_)),
      row_(scratch.take_each<float>(workers, moe.gate.k)),
      gate_packed_(scratch.take<float>(packed(moe.gate) * most_)),
      up_packed_(scratch.take<float>(same_pack_ ? 0 : packed(moe.up) * most_)),
      act_(scratch.take<float>(static_cast<size_t>(most_) * moe.gate.n)),
      down_packed_(scratch.take<float>(packed(moe.down) * most_)),
      y_(scratch.take<float>(
          arrivals ? static_cast<size_t>(most_) * moe.down.n : 0)),
      tile_y_(scratch.take_each<float>(workers, most_tile_values())) {}

int FusedMoe::stages() const {
  return kStages * ((moe_.x.shape(0) + kMaxTokens - 1) / kMaxTokens);
}

Staged::Stage FusedMoe::begin(int stage) {
  switch (stage % kStages) {
    case 0:
      return begin_chunk(stage / kStages * kMaxTokens);
    case 1:
      take_at_hand(all_panels());
      return begin_gate_up();
    case 2:
      return begin_pack();
    default:
      return begin_down_sum();
  }
}

void FusedMoe::tile(int stage, int number, int worker) {
  switch (stage % kStages) {
    case 0:
      return pack_input(packers_[number], row_[worker]);
    case 1:
      return gate_up(number);
    case 2:
      return pack_activations(at_hand_[number]);
    default:
      return down_sum(number, worker);
  }
}

void FusedMoe::run_as_they_come(Arrivals& arrivals) {
  for (int first = 0; first < moe_.x.shape(0); first += kMaxTokens) {
    run_tiles(begin_chunk(first), [&](int t, int worker) {
      pack_input(packers_[t], row_[worker]);
    });
    std::vector<int> pending = distinct_slots();
    take_at_hand(take(arrivals, pending));
    project();
    if (pending.empty()) {
      run_tiles(
          begin_down_sum(), [&](int t, int worker) { down_sum(t, worker); });
      continue;
    }
    run_tiles(begin_down(), [&](int t) { down(t); });
    while (!pending.empty()) {
      take_at_hand(take(arrivals, pending));
      project();
      run_tiles(begin_down(), [&](int t) { down(t); });
    }
    run_tiles(begin_sum(), [&](int t) { sum(t); });
  }
}

size_t FusedMoe::most_tile_values() const {
  const size_t pairs = most_, n = moe_.down.n;
  const size_t most = std::max<size_t>(kMaxValues, pairs * kMinTile);
  return std::min({pairs * kMaxTileRows, most, pairs * n});
}

void FusedMoe::run_tiles(const Stage& stage, TaskRef task) const {
  parallel_for(stage.tiles, task, stage.work, workers_);
}

Staged::Stage FusedMoe::begin_chunk(int first) {
  first_ = first;
  tokens_ = std::min(kMaxTokens, moe_.x.shape(0) - first);
  const int* slots = moe_.slots.data<int32_t>() + first_ * top_k_;
  panels_.group(slots, tokens_ * top_k_);
  return begin_inputs();
}

// Divides a matrix's rows into tiles; each is done for `groups` groups.
Staged::Stage FusedMoe::divide(int n, int k, int groups, double work) {
  rows_ = tile_rows(n, k, groups, workers_);
  tiles_ = (n + rows_ - 1) / rows_;
  return {tiles_ * groups, work};
}

// Divides the panels at hand into groups, which a weight meets together.
void FusedMoe::take_at_hand(Batch batch) {
  at_hand_ = batch;
  group_count_ = 0;
  for (size_t at = 0; at < batch.size();) {
    groups_[group_count_++] = static_cast<int>(at);
    at += panels_.together(batch.subspan(at));
  }
  groups_[group_count_] = static_cast<int>(batch.size());
}

// Where a tile's rows of w begin, if there is such a tile.
Matrix::Rows FusedMoe::tile_rows_at(const Matrix& w, int number) const {
  if (number >= tiles_ * group_count_) {
    return {};
  }
  const int slot = panels_[group(number / tiles_)[0]].slot;
  return {&w, slot, number % tiles_ * rows_};
}

// Multiplies rows of w of a group's slot by the group's panels, which
// input(i) finds, into `out` [pair of the group, rows].
template <class Input>
void FusedMoe::multiply(
    const Matrix& w,
    Batch group,
    int first,
    int rows,
    const Input& input,
    float* out,
    const Matrix::Rows& next) const {
  const float* at[kMaxPanels];
  for (size_t i = 0; i < group.size(); i++) {
    at[i] = input(group[i]);
  }
  const auto [slot, pair, width] = panels_[group[0]];
  w.dot(slot, first, rows, std::span(at, group.size()), width, out, next);
}

FusedMoe::Batch FusedMoe::all_panels() const {
  const auto all = batch_.first(panels_.count());
  std::iota(all.begin(), all.end(), 0);
  return all;
}

std::vector<int> FusedMoe::distinct_slots() const {
  std::vector<int> slots;
  for (int i = 0; i < panels_.count(); i++) {
    if (slots.empty() || slots.back() != panels_[i].slot) {
      slots.push_back(panels_[i].slot);
    }
  }
  return slots;
}

FusedMoe::Batch FusedMoe::take(Arrivals& arrivals, std::vector<int>& pending)
    const {
  const std::vector<int> slots = arrivals.take(pending);
  int count = 0;
  for (int i = 0; i < panels_.count(); i++) {
    if (std::ranges::find(slots, panels_[i].slot) != slots.end()) {
      batch_[count++] = i;
    }
  }
  return batch_.first(count);
}

double FusedMoe::work(Batch batch, int matrices) const {
  int pairs = 0;
  for (int i : batch) {
    pairs += panels_[i].width;
  }
  return static_cast<double>(moe_.gate.n) * moe_.gate.k * matrices * pairs;
}

// Packs x for all panels. Those over the same tokens share it, which are all
// of them where there is one token.
Staged::Stage FusedMoe::begin_inputs() {
  float *gate = gate_packed_.data(), *up = up_packed_.data();
  int count = 0;
  size_t vectors = 0;
  panels_.each_twin([&](int i, int twin) {
    if (twin == i) {
      const int width = panels_[i].width;
      packers_[count++] = i;
      gate_inputs_[i] = gate;
      up_inputs_[i] = same_pack_ ? gate : up;
      gate += packed(moe_.gate) * width;
      up += same_pack_ ? 0 : packed(moe_.up) * width;
      vectors += width;
    }
    gate_inputs_[i] = gate_inputs_[twin];
    up_inputs_[i] = up_inputs_[twin];
  });
  const double values = static_cast<double>(vectors) * moe_.gate.k;
  if (count > 1 && values >= kFewInputs) {
    return {count, 4 * values};
  }
  for (int i = 0; i < count; i++) {
    pack_input(packers_[i], row_[0]);
  }
  return {0, 0};
}

void FusedMoe::pack_input(int i, float* row) const {
  const Matrix &gate = moe_.gate, &up = moe_.up;
  const auto pairs = panels_.pairs(i);
  const int width = panels_[i].width;
  for (int m = 0; m < width; m++) {
    load_row(moe_.x, first_ + panels_.token(pairs[m]), gate.k, row);
    gate.kernel->pack(row, gate.k, gate_inputs_[i], m, width);
    if (!same_pack_) {
      up.kernel->pack(row, up.k, up_inputs_[i], m, width);
    }
  }
}

// Computes all but the down projection.
void FusedMoe::project() {
  run_tiles(begin_gate_up(), [&](int t) { gate_up(t); });
  run_tiles(begin_pack(), [&](int i) { pack_activations(at_hand_[i]); });
}

Staged::Stage FusedMoe::begin_gate_up() {
  return divide(moe_.gate.n, moe_.gate.k, group_count_, work(at_hand_, 2));
}

void FusedMoe::gate_up(int number) const {
  const Batch panels = group(number / tiles_);
  const int first = number % tiles_ * rows_;
  const int rows = std::min(rows_, moe_.gate.n - first);
  Outputs gate, up;
  const auto from = [](std::span<float* const> inputs) {
    return [inputs](int i) { return inputs[i]; };
  };
  const Matrix::Rows here{&moe_.up, panels_[panels[0]].slot, first};
  multiply(moe_.gate, panels, first, rows, from(gate_inputs_), gate, here);
  const auto then = tile_rows_at(moe_.gate, number + 1);
  multiply(moe_.up, panels, first, rows, from(up_inputs_), up, then);
  size_t at = 0;
  for (int i : panels) {
    for (int pair : panels_.pairs(i)) {
      kernels().swiglu(gate + at, up + at, act(pair) + first, rows, moe_.type);
      at += rows;
    }
  }
}

Staged::Stage FusedMoe::begin_pack() const {
  const double values = work(at_hand_, 1) / moe_.gate.k;
  if (values >= kFewActivations) {
    return {static_cast<int>(at_hand_.size()), 4 * values};
  }
  for (int i : at_hand_) {
    pack_activations(i);
  }
  return {0, 0};
}

void FusedMoe::pack_activations(int i) const {
  const Matrix& down = moe_.down;
  const int width = panels_[i].width;
  for (int m = 0; m < width; m++) {
    const float* from = act(panels_.pairs(i)[m]);
    down.kernel->pack(from, down.k, down_input(i), m, width);
  }
}

// Computes rows of y for the pairs of a group, one pair every `stride`
// values.
void FusedMoe::down_rows(
    Batch panels,
    int first,
    int rows,
    float* y,
    size_t stride,
    const Matrix::Rows& next) const {
  const auto from = [this](int i) { return down_input(i); };
  const auto pairs = panels_.pairs(panels[0]);
  if (panels.size() == 1 && pairs.size() == 1) {
    float* to = y + pairs[0] * stride;
    multiply(moe_.down, panels, first, rows, from, to, next);
    return;
  }
  Outputs out;
  multiply(moe_.down, panels, first, rows, from, out, next);
  const float* values = out;
  for (int i : panels) {
    for (int pair : panels_.pairs(i)) {
      std::copy_n(values, rows, y + pair * stride);
      values += rows;
    }
  }
}

// Sums the choices of each token, in order; each is rounded as the unfused
// chain stores it.
void FusedMoe::sum_rows(int first, int rows, const float* y, size_t stride)
    const {
  const float* scores = moe_.scores.data<float>() + first_ * top_k_;
  for (int token = 0; token < tokens_; token++) {
    float sum[kMaxTileRows] = {};
    for (int j = token * top_k_; j < (token + 1) * top_k_; j++) {
      kernels().add_scored(y + j * stride, scores[j], rows, moe_.type, sum);
    }
    const size_t row = static_cast<size_t>(first_ + token);
    store_row(moe_.y, row * moe_.down.n + first, sum, rows);
  }
}

Staged::Stage FusedMoe::begin_down() {
  return divide(moe_.down.n, moe_.down.k, group_count_, work(at_hand_, 1));
}

// Computes a tile of y_ [pair, n].
void FusedMoe::down(int number) const {
  const int n = moe_.down.n, first = number % tiles_ * rows_;
  const int rows = std::min(rows_, n - first);
  const auto next = tile_rows_at(moe_.down, number + 1);
  down_rows(group(number / tiles_), first, rows, y_.data() + first, n, next);
}

Staged::Stage FusedMoe::begin_sum() {
  const int n = moe_.down.n;
  return divide(n, top_k_, 1, static_cast<double>(n) * tokens_ * top_k_);
}

void FusedMoe::sum(int number) const {
  const int n = moe_.down.n, first = number * rows_;
  sum_rows(first, std::min(rows_, n - first), y_.data() + first, n);
}

Staged::Stage FusedMoe::begin_down_sum() {
  const int n = moe_.down.n, pairs = tokens_ * top_k_;
  const int most = std::max(kMinTile, kMaxValues / pairs);
  // A tile has rows of all groups, so that one for a thread is enough.
  rows_ = std::min(tile_rows(n, moe_.down.k * pairs, 4, workers_), most);
  return {(n + rows_ - 1) / rows_, work(at_hand_, 1)};
}

// Computes `down` and the sum of all panels for a tile of rows, so that the
// choices' outputs stay in a core's L2 cache.
void FusedMoe::down_sum(int number, int worker) const {
  const int first = number * rows_;
  const int rows = std::min(rows_, moe_.down.n - first);
  for (int i = 0; i < group_count_; i++) {
    const bool last = i + 1 == group_count_;
    const int slot = panels_[group(last ? 0 : i + 1)[0]].slot;
    const Matrix::Rows next{&moe_.down, slot, last ? first + rows : first};
    down_rows(group(i), first, rows, tile_y_[worker], rows, next);
  }
  sum_rows(first, rows, tile_y_[worker], rows);
}

}  // namespace glm_fused::cpu
