#include "cpu/attention/sparse_mla_decode.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/attention/attention_kernels.h"
#include "cpu/dot/matrix.h"
#include "cpu/runtime/aligned_floats.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/thread_pool.h"
#include "primitives.h"
#include "reference/reference.h"

namespace glm_fused {

namespace cpu {

namespace {

constexpr size_t kMaxScratch = 1 << 23;  // floats of queries taken together
constexpr int kLane = 16;
constexpr int kColumns = 64;  // the least that a task of the combine takes

// One query's list of keys and the scratch of its splits.
struct Query {
  std::vector<int32_t> keys;
  std::vector<int> counts;  // of each split that has keys
  std::vector<int> begins;  // its first key
  AlignedFloats q, p, m, l, e, total;

  Query(int list, int width, int lanes)
      : q(static_cast<size_t>(width) * lanes),
        p(static_cast<size_t>(list) * lanes),
        m(splits(list) * lanes),
        l(splits(list) * lanes),
        e(splits(list) * lanes),
        total(lanes) {}

  static size_t splits(int list) {
    return (list + kSplit - 1) / kSplit;
  }
};

// Queries [first, first + count) of one sequence.
class Block {
 public:
  Block(const Mla& a, int b, int first, int count)
      : a_(a),
        b_(b),
        first_(first),
        count_(count),
        list_(a.list_size()),
        width_(a.layout.rank + a.layout.rope),
        lanes_((a.heads() + kLane - 1) / kLane * kLane),
        rows_(a.rows(b)),
        queries_(count) {}

  void run() {
    const auto each = [&](int i) { prepare(i); };
    parallel_for(count_, each, static_cast<double>(width_) * lanes_ * count_);
    split();
    const auto weigh = [&](int i) {
      Query& q = *queries_[i];
      attention_kernels().weigh(parts(i), q.e.get(), q.total.get());
    };
    parallel_for(count_, weigh, work() / width_);
    combine();
  }

 private:
  double work() const {
    return static_cast<double>(width_) * lanes_ * list_ * count_;
  }

  void prepare(int i) {
    queries_[i] = std::make_unique<Query>(list_, width_, lanes_);
    Query& query = *queries_[i];
    const size_t row = a_.row(b_, first_ + i);
    const Floats q = uninitialized(static_cast<size_t>(a_.heads()) * width_);
    load_row(a_.q, row, a_.heads() * width_, q.get());
    for (int d = 0; d < width_; d++) {
      float* to = query.q.get() + static_cast<size_t>(d) * lanes_;
      for (int h = 0; h < lanes_; h++) {
        to[h] = h < a_.heads() ? q[static_cast<size_t>(h) * width_ + d] : 0;
      }
    }
    for (int s = 0; s < list_; s += kSplit) {
      const size_t begin = query.keys.size();
      for (int j = s; j < std::min(s + kSplit, list_); j++) {
        const int key = a_.entry(b_, first_ + i, j);
        if (key >= 0) {
          query.keys.push_back(key);
        }
      }
      if (query.keys.size() > begin) {
        query.begins.push_back(static_cast<int>(begin));
        query.counts.push_back(static_cast<int>(query.keys.size() - begin));
      }
    }
  }

  // A task takes several splits, so that it can fetch one's keys during
  // another.
  void split() {
    constexpr int most = 16;
    const int splits = static_cast<int>(Query::splits(list_));
    const int share = splits * count_ / (2 * num_threads());
    const int group = std::clamp(share, 1, most);
    const int groups = (splits + group - 1) / group;
    const auto task = [&](int t) {
      const Query& q = *queries_[t / groups];
      const int begin = t % groups * group;
      const int end =
          std::min(begin + group, static_cast<int>(q.counts.size()));
      for (int s = begin; s < end; s++) {
        const size_t lane = static_cast<size_t>(s) * lanes_;
        attention_kernels().split(
            {q.q.get(),
             lanes_,
             a_.scale,
             &rows_,
             q.keys.data() + q.begins[s],
             q.counts[s],
             s + 1 < end ? q.counts[s + 1] : 0,
             q.p.get() + static_cast<size_t>(q.begins[s]) * lanes_,
             q.m.get() + lane,
             q.l.get() + lane});
      }
    };
    parallel_for(count_ * groups, task, work());
  }

  CombineArgs parts(int i) const {
    const Query& q = *queries_[i];
    return {
        &rows_,
        q.keys.data(),
        q.counts.data(),
        static_cast<int>(q.counts.size()),
        a_.heads(),
        lanes_,
        q.p.get(),
        q.m.get(),
        q.l.get(),
        q.e.get(),
        q.total.get(),
        0,
        rows_.rank,
        a_.out(b_, first_ + i)};
  }

  // A query's columns are divided no further than the threads need: each part
  // walks all of its rows.
  void combine() {
    const int wanted = (num_threads() + count_ - 1) / count_;
    const int blocks = (rows_.rank + kColumns - 1) / kColumns;
    const int columns = (blocks + wanted - 1) / wanted * kColumns;
    const int tasks = (rows_.rank + columns - 1) / columns;
    const auto task = [&](int t) {
      CombineArgs args = parts(t / tasks);
      args.column = t % tasks * columns;
      args.columns = std::min(columns, rows_.rank - args.column);
      if (args.splits == 0) {
        std::fill_n(args.out, static_cast<size_t>(args.heads) * rows_.rank, 0);
      } else {
        attention_kernels().combine(args);
      }
    };
    parallel_for(count_ * tasks, task, work());
  }

  const Mla& a_;
  const int b_, first_, count_, list_, width_, lanes_;
  const Rows rows_;
  std::vector<std::unique_ptr<Query>> queries_;
};

}  // namespace

void sparse_mla_decode(const Mla& a) {
  const size_t width = a.layout.rank + a.layout.rope;
  const size_t lanes = a.heads() + kLane - 1;
  const size_t floats = (a.list_size() + width) * lanes;
  const int step = static_cast<int>(std::max<size_t>(kMaxScratch / floats, 1));
  for (int b = 0; b < a.q.shape(0); b++) {
    for (int first = 0; first < a.queries(); first += step) {
      Block(a, b, first, std::min(step, a.queries() - first)).run();
    }
  }
}

}  // namespace cpu

void SparseMlaDecode::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto task = [layout = layout_,
                     scale = scale_,
                     ropes = ropes_,
                     selected = selected_,
                     reference = reference_](const auto& in, auto& out) {
    const cpu::RowArray latents(in[2]);
    std::optional<cpu::RowArray> rope_rows;
    if (ropes) {
      rope_rows.emplace(in[3]);
    }
    const cpu::Mla a{
        in[0],
        in[1],
        latents,
        ropes ? &*rope_rows : nullptr,
        selected ? &in[3 + ropes] : nullptr,
        layout,
        scale,
        out[0]};
    if (reference) {
      reference::sparse_mla_decode(a);
    } else {
      cpu::sparse_mla_decode(a);
    }
  };
  cpu::dispatch(*this, inputs, outputs, task);
}

}  // namespace glm_fused
