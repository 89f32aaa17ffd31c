#include "cpu/attention/indexer_topk.h"

#include <algorithm>

#include "cache_primitives.h"
#include "cpu/attention/attention_kernels.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "reference/reference.h"

namespace glm_fused {

namespace cpu {

namespace {

// This many scores are held at once, 64 MiB; the queries that fit share each
// loaded key.
constexpr size_t kMaxScores = 1 << 24;
// A task takes so many keys of a long cache, and of a short one a share that is
// whole vectors.
constexpr int kTaskKeys = 384, kVector = 16;

class Topk : public Staged {
 public:
  Topk(const Indexer& a, bool reference, Scratch& scratch, int workers)
      : a_(a),
        reference_(reference),
        workers_(workers),
        most_keys_(a.keys.most_keys()),
        step_(
            std::min<size_t>(
                std::max<size_t>(kMaxScores / std::max(most_keys_, 1), 1),
                a.queries())),
        width_(static_cast<size_t>(a.heads()) * a.dim()),
        packed_(attention_kernels().index_packed(a.heads(), a.dim())),
        q_(scratch.take<float>(packed_ * step_)),
        scores_(scratch.take<uint32_t>(stride() * step_)),
        low_(scratch.take<int>(step_)),
        high_(scratch.take<int>(step_)),
        row_(scratch.take_each<float>(workers, width_)),
        spare_(scratch.take_each<float>(
            workers,
            attention_kernels().index_spare(step_, a.heads()))),
        words_(scratch.take_each<uint32_t>(workers, most_keys_ + 16)) {}

  void run() {
    if (reference_) {
      a_.keys.load();
      reference::indexer_topk(a_);
    } else {
      run_stages(workers_);
    }
  }

  // For each block of queries of a sequence there are three stages.
  int stages() const override {
    return 3 * a_.q.shape(0) * blocks();
  }

  Stage begin(int stage) override {
    if (stage == 0) {
      a_.keys.load();
    }
    switch (stage % 3) {
      case 0:
        return begin_block(stage / 3);
      case 1:
        return begin_scores();
      default:
        return {count_, 10.0 * a_.keys.keys() * count_};
    }
  }

  void tile(int stage, int number, int worker) override {
    switch (stage % 3) {
      case 0:
        return pack(number, worker);
      case 1:
        return score(number, worker);
      default:
        return select(number, worker);
    }
  }

 private:
  // How far apart the scores of two queries are.
  size_t stride() const {
    return most_keys_;
  }

  // How many blocks of queries a sequence has.
  int blocks() const {
    return (a_.queries() + step_ - 1) / step_;
  }

  Stage begin_block(int number) {
    b_ = number / blocks();
    first_ = number % blocks() * step_;
    count_ = std::min(step_, a_.queries() - first_);
    std::fill_n(low_.begin(), count_, 0);
    std::fill_n(high_.begin(), count_, 0);
    return {count_, static_cast<double>(width_) * count_};
  }

  // A query that sees at most k keys takes them all, unscored.
  void pack(int i, int worker) const {
    const Visible visible = a_.visible(b_);
    const int high = visible.high(first_ + i);
    if (high - visible.low <= a_.k()) {
      select_all(visible.low, high, a_.k(), a_.out(b_, first_ + i));
      return;
    }
    low_[i] = visible.low;
    high_[i] = high;
    float* q = row_[worker];
    load_row(a_.q, a_.row(b_, first_ + i), width_, q);
    attention_kernels().index_pack(
        q, a_.heads(), a_.dim(), q_.data() + i * packed_);
  }

  Stage begin_scores() {
    const int last = *std::max_element(high_.begin(), high_.begin() + count_);
    const double work = static_cast<double>(width_) * last * count_;
    const int share = (last + workers_ - 1) / workers_;
    task_ = std::min((share + kVector - 1) / kVector * kVector, kTaskKeys);
    return {last > 0 ? (last + task_ - 1) / task_ : 0, work};
  }

  void score(int number, int worker) const {
    const int begin = number * task_, keys = a_.keys.keys();
    attention_kernels().index_scores(
        {q_.data(),
         a_.weights.data<float>() + a_.row(b_, first_) * a_.heads(),
         count_,
         a_.heads(),
         a_.dim(),
         a_.scale,
         a_.rows(b_),
         begin,
         std::min(begin + task_, keys),
         keys,
         low_.data(),
         high_.data(),
         scores_.data(),
         stride(),
         spare_[worker]});
  }

  void select(int i, int worker) const {
    const int low = low_[i], count = high_[i] - low;
    if (count == 0) {
      return;
    }
    int32_t* out = a_.out(b_, first_ + i);
    const uint32_t* words = scores_.data() + stride() * i;
    attention_kernels().select(words + low, count, a_.k(), words_[worker], out);
    for (int j = 0; j < a_.k(); j++) {
      out[j] += low;
    }
  }

  const Indexer a_;
  const bool reference_;
  const int workers_, most_keys_, step_;
  const size_t width_, packed_;
  const std::span<float> q_;
  const std::span<uint32_t> scores_;  // [query, key]
  const std::span<int> low_, high_;
  const Shares<float> row_, spare_;
  const Shares<uint32_t> words_;
  int b_ = 0, first_ = 0, count_ = 0;  // sequence b_, its queries at hand
  int task_ = 0;                       // keys
};

}  // namespace

}  // namespace cpu

void IndexerTopk::read(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs,
    const int* filled) {
  const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
    const cpu::RowArray keys(in[1], scratch, filled);
    const cpu::Indexer a{in[0], keys, in[2], in[3], layout_, scale_, out[0]};
    return cpu::Topk(a, reference_, scratch, n);
  };
  cpu::dispatch(*this, inputs, outputs, make, reference_);
}

}  // namespace glm_fused
