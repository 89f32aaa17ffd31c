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
                static_cast<size_t>(a.q.shape(0)) * a.queries())),
        together_(std::max(step_ / std::max(a.queries(), 1), 1)),
        width_(static_cast<size_t>(a.heads()) * a.dim()),
        packed_(attention_kernels().index_packed(a.heads(), a.dim())),
        q_(scratch.take<float>(packed_ * step_)),
        scores_(scratch.take<uint32_t>(stride() * step_)),
        low_(scratch.take<int>(step_)),
        high_(scratch.take<int>(step_)),
        row_(scratch.take_each<float>(workers, width_)),
        spare_(scratch.take_each<float>(
            workers,
            attention_kernels().index_spare(
                std::min(step_, a.queries()),
                a.heads()))),
        words_(scratch.take_each<uint32_t>(workers, most_keys_ + 16)) {}

  void run() {
    if (reference_) {
      a_.keys.load();
      reference::indexer_topk(a_);
    } else {
      run_stages(workers_);
    }
  }

  // There are three stages for each block of queries, which are all of several
  // sequences or some of one.
  int stages() const override {
    const int groups = (a_.q.shape(0) + together_ - 1) / together_;
    return 3 * groups * blocks();
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
    b_ = number / blocks() * together_;
    first_ = number % blocks() * step_;
    each_ = std::min(step_, a_.queries() - first_);
    count_ = each_ * std::min(together_, a_.q.shape(0) - b_);
    std::fill_n(low_.begin(), count_, 0);
    std::fill_n(high_.begin(), count_, 0);
    return {count_, static_cast<double>(width_) * count_};
  }

  // A query that sees at most k keys takes them all, unscored.
  void pack(int i, int worker) const {
    const int b = b_ + i / each_, query = first_ + i % each_;
    const Visible visible = a_.visible(b);
    const int high = visible.high(query);
    if (high - visible.low <= a_.k()) {
      select_all(visible.low, high, a_.k(), a_.out(b, query));
      return;
    }
    low_[i] = visible.low;
    high_[i] = high;
    float* q = row_[worker];
    load_row(a_.q, a_.row(b, query), width_, q);
    attention_kernels().index_pack(
        q, a_.heads(), a_.dim(), q_.data() + i * packed_);
  }

  Stage begin_scores() {
    const int last = std::ranges::max(high_.first(count_));
    const double work = static_cast<double>(width_) * last * count_;
    const int sequences = count_ / each_;
    const int wanted = (workers_ + sequences - 1) / sequences;
    const int share = (last + wanted - 1) / wanted;
    task_ = std::min((share + kVector - 1) / kVector * kVector, kTaskKeys);
    tasks_ = last > 0 ? (last + task_ - 1) / task_ : 0;
    return {sequences * tasks_, work};
  }

  // Scores a share of the keys of a sequence for its queries at hand.
  void score(int number, int worker) const {
    const int b = b_ + number / tasks_, at = number / tasks_ * each_;
    const int begin = number % tasks_ * task_, keys = a_.keys.keys();
    if (std::ranges::max(high_.subspan(at, each_)) <= begin) {
      return;
    }
    attention_kernels().index_scores(
        {q_.data() + at * packed_,
         a_.weights.data<float>() + a_.row(b, first_) * a_.heads(),
         each_,
         a_.heads(),
         a_.dim(),
         a_.scale,
         a_.rows(b),
         begin,
         std::min(begin + task_, keys),
         keys,
         low_.data() + at,
         high_.data() + at,
         scores_.data() + at * stride(),
         stride(),
         spare_[worker]});
  }

  void select(int i, int worker) const {
    const int low = low_[i], count = high_[i] - low;
    if (count == 0) {
      return;
    }
    int32_t* out = a_.out(b_ + i / each_, first_ + i % each_);
    const uint32_t* words = scores_.data() + stride() * i;
    attention_kernels().select(words + low, count, a_.k(), words_[worker], out);
    for (int j = 0; j < a_.k(); j++) {
      out[j] += low;
    }
  }

  const Indexer a_;
  const bool reference_;
  const int workers_, most_keys_;
  const int step_, together_;  // queries and sequences that are taken together
  const size_t width_, packed_;
  const std::span<float> q_;
  const std::span<uint32_t> scores_;  // [query, key]
  const std::span<int> low_, high_;
  const Shares<float> row_, spare_;
  const Shares<uint32_t> words_;
  // The first sequence at hand, the first of its queries and how many it has
  // there, how many there are of all sequences.
  int b_ = 0, first_ = 0, each_ = 0, count_ = 0;
  int task_ = 0, tasks_ = 0;  // keys of a task; tasks of a sequence
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
