#include "cpu/attention/sparse_mla_decode.h"

#include <algorithm>
#include <optional>
#include <span>

#include "cpu/attention/attention_kernels.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/dispatch.h"
#include "primitives.h"
#include "reference/reference.h"

namespace glm_fused {

namespace cpu {

namespace {

constexpr size_t kMaxScratch = 1 << 23;  // floats for the queries of a step
constexpr int kLane = 16;
constexpr int kColumns = 64;  // a task of the combine takes no fewer

class Attention {
 public:
  Attention(const Mla& a, bool reference, Scratch& scratch, int workers)
      : a_(a),
        reference_(reference),
        workers_(workers),
        list_(a.list_size()),
        width_(a.layout.rank + a.layout.rope),
        lanes_(round_up(a.heads(), kLane)),
        splits_((list_ + kSplit - 1) / kSplit),
        step_(step()),
        keys_(scratch.take_each<int32_t>(step_, list_)),
        counts_(scratch.take_each<int>(step_, splits_)),
        begins_(scratch.take_each<int>(step_, splits_)),
        filled_(scratch.take<int>(step_)),
        q_(scratch.take_each<float>(step_, lanes(width_))),
        p_(scratch.take_each<float>(step_, lanes(list_))),
        m_(scratch.take_each<float>(step_, lanes(splits_))),
        l_(scratch.take_each<float>(step_, lanes(splits_))),
        e_(scratch.take_each<float>(step_, lanes(splits_))),
        total_(scratch.take_each<float>(step_, lanes_)),
        row_(scratch.take_each<float>(
            workers,
            static_cast<size_t>(a.heads()) * width_)),
        sums_(scratch.take_each<float>(
            workers,
            static_cast<size_t>(a.heads()) * round_up(a.layout.rank, kLane))) {}

  void run() {
    a_.latents.load();
    if (a_.ropes) {
      a_.ropes->load();
    }
    if (reference_) {
      reference::sparse_mla_decode(a_);
      return;
    }
    for (b_ = 0; b_ < a_.q.shape(0); b_++) {
      rows_ = a_.rows(b_);
      for (first_ = 0; first_ < a_.queries(); first_ += step_) {
        count_ = std::min(step_, a_.queries() - first_);
        run_block();
      }
    }
  }

 private:
  static int round_up(int n, int unit) {
    return (n + unit - 1) / unit * unit;
  }

  size_t lanes(int rows) const {
    return static_cast<size_t>(rows) * lanes_;
  }

  // Returns how many queries are taken together.
  int step() const {
    const size_t lanes = a_.heads() + kLane - 1;
    const size_t floats = (static_cast<size_t>(list_) + width_) * lanes;
    return static_cast<int>(std::min<size_t>(
        std::max<size_t>(kMaxScratch / floats, 1), a_.queries()));
  }

  double work() const {
    return static_cast<double>(width_) * lanes_ * list_ * count_;
  }

  void run_block() const {
    const auto each = [&](int i, int worker) {
      load_query(i, row_[worker]);
      list_keys(i);
    };
    const double values = static_cast<double>(width_) * lanes_ * count_;
    parallel_for(count_, each, values, workers_);
    split();
    const auto weigh = [&](int i) {
      attention_kernels().weigh(parts(i), e_[i], total_[i]);
    };
    parallel_for(count_, weigh, work() / width_, workers_);
    combine();
  }

  void load_query(int i, float* q) const {
    load_row(a_.q, a_.row(b_, first_ + i), a_.heads() * width_, q);
    for (int d = 0; d < width_; d++) {
      float* to = q_[i] + lanes(d);
      for (int h = 0; h < lanes_; h++) {
        to[h] = h < a_.heads() ? q[static_cast<size_t>(h) * width_ + d] : 0;
      }
    }
  }

  // Lists the visible keys of a query, back to back, and its splits that have
  // any.
  void list_keys(int i) const {
    int keys = 0, splits = 0;
    for (int s = 0; s < list_; s += kSplit) {
      const int begin = keys;
      for (int j = s; j < std::min(s + kSplit, list_); j++) {
        const int key = a_.entry(b_, first_ + i, j);
        if (key >= 0) {
          keys_[i][keys++] = key;
        }
      }
      if (keys > begin) {
        begins_[i][splits] = begin;
        counts_[i][splits++] = keys - begin;
      }
    }
    filled_[i] = splits;
  }

  // Computes the splits. A task takes several, so that it can fetch one's keys
  // during another.
  void split() const {
    constexpr int most = 16;
    const int share = splits_ * count_ / (2 * workers_);
    const int group = std::clamp(share, 1, most);
    const int groups = (splits_ + group - 1) / group;
    const auto task = [&](int t) {
      const int i = t / groups, begin = t % groups * group;
      const int end = std::min(begin + group, filled_[i]);
      for (int s = begin; s < end; s++) {
        attention_kernels().split(
            {q_[i],
             lanes_,
             a_.scale,
             &*rows_,
             keys_[i] + begins_[i][s],
             counts_[i][s],
             s + 1 < end ? counts_[i][s + 1] : 0,
             p_[i] + lanes(begins_[i][s]),
             m_[i] + lanes(s),
             l_[i] + lanes(s)});
      }
    };
    parallel_for(count_ * groups, task, work(), workers_);
  }

  CombineArgs parts(int i) const {
    return {
        &*rows_,
        keys_[i],
        counts_[i],
        filled_[i],
        a_.heads(),
        lanes_,
        p_[i],
        m_[i],
        l_[i],
        e_[i],
        total_[i],
        0,
        rows_->rank,
        nullptr,
        a_.out(b_, first_ + i)};
  }

  // Combines the splits. A query's columns are divided no further than the
  // threads need, because each part walks all of its rows.
  void combine() const {
    const int rank = rows_->rank;
    const int wanted = (workers_ + count_ - 1) / count_;
    const int blocks = (rank + kColumns - 1) / kColumns;
    const int columns = (blocks + wanted - 1) / wanted * kColumns;
    const int tasks = (rank + columns - 1) / columns;
    const auto task = [&](int t, int worker) {
      CombineArgs args = parts(t / tasks);
      args.column = t % tasks * columns;
      args.columns = std::min(columns, rank - args.column);
      args.sums = sums_[worker];
      if (args.splits == 0) {
        std::fill_n(args.out, static_cast<size_t>(args.heads) * rank, 0);
      } else {
        attention_kernels().combine(args);
      }
    };
    parallel_for(count_ * tasks, task, work(), workers_);
  }

  const Mla a_;
  const bool reference_;
  const int workers_, list_, width_, lanes_, splits_, step_;
  // For each query these are its keys, the sizes, first keys and number of its
  // splits, and what the kernels need.
  const Shares<int32_t> keys_;
  const Shares<int> counts_, begins_;
  const std::span<int> filled_;
  const Shares<float> q_, p_, m_, l_, e_, total_;
  const Shares<float> row_, sums_;     // one for each worker
  int b_ = 0, first_ = 0, count_ = 0;  // sequence b_, its queries at hand
  std::optional<Rows> rows_;
};

}  // namespace

}  // namespace cpu

void SparseMlaDecode::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto make = [&](auto& in, auto& out, cpu::Scratch& scratch, int n) {
    const cpu::RowArray latents(in[2], scratch);
    std::optional<cpu::RowArray> ropes;
    if (ropes_) {
      ropes.emplace(in[3], scratch);
    }
    const cpu::Mla a{
        in[0],
        in[1],
        latents,
        ropes,
        selected_ ? &in[3 + ropes_] : nullptr,
        layout_,
        scale_,
        out[0]};
    return cpu::Attention(a, reference_, scratch, n);
  };
  cpu::dispatch(*this, inputs, outputs, make, reference_);
}

}  // namespace glm_fused
