#include "cpu/attention/indexer_topk.h"

#include <algorithm>

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

// Scores held at once, 64 MiB: as many queries as fit share each loaded key.
constexpr size_t kMaxScores = 1 << 24;
constexpr int kTaskKeys = 384;

// Queries [first, first + count) of one sequence.
class Block {
 public:
  Block(const Indexer& a, int b, int first, int count)
      : a_(a),
        b_(b),
        first_(first),
        count_(count),
        keys_(a.keys.keys()),
        packed_(attention_kernels().index_packed(a.heads(), a.dim())),
        q_(packed_ * count),
        scores_(new uint32_t[static_cast<size_t>(keys_) * count]),
        low_(count, 0),
        high_(count, 0) {}

  void run() {
    pack();
    score();
    select();
  }

 private:
  // A query that sees at most k keys takes them all, unscored.
  void pack() {
    const Visible visible = a_.visible(b_);
    const size_t width = static_cast<size_t>(a_.heads()) * a_.dim();
    const auto task = [&](int i) {
      const int high = visible.high(first_ + i);
      if (high - visible.low <= a_.k()) {
        select_all(visible.low, high, a_.k(), a_.out(b_, first_ + i));
        return;
      }
      low_[i] = visible.low;
      high_[i] = high;
      const Floats q = uninitialized(width);
      load_row(a_.q, a_.row(b_, first_ + i), width, q.get());
      attention_kernels().index_pack(
          q.get(), a_.heads(), a_.dim(), q_.get() + i * packed_);
    };
    parallel_for(count_, task, static_cast<double>(width) * count_);
  }

  void score() {
    IndexArgs args{
        q_.get(),
        a_.weights.data<float>() + a_.row(b_, first_) * a_.heads(),
        count_,
        a_.heads(),
        a_.dim(),
        a_.scale,
        a_.rows(b_),
        0,
        0,
        low_.data(),
        high_.data(),
        scores_.get(),
        static_cast<size_t>(keys_)};
    const auto task = [&](int i) {
      IndexArgs part = args;
      part.begin = i * kTaskKeys;
      part.end = std::min(part.begin + kTaskKeys, keys_);
      attention_kernels().index_scores(part);
    };
    const int last = *std::max_element(high_.begin(), high_.end());
    const double work = static_cast<double>(a_.heads()) * a_.dim() * last;
    parallel_for((last + kTaskKeys - 1) / kTaskKeys, task, work * count_);
  }

  void select() {
    const auto task = [&](int i) {
      const int low = low_[i], count = high_[i] - low;
      if (count == 0) {
        return;
      }
      const std::unique_ptr<uint32_t[]> spare(new uint32_t[count + 16]);
      int32_t* out = a_.out(b_, first_ + i);
      const uint32_t* words = scores_.get() + static_cast<size_t>(keys_) * i;
      attention_kernels().select(words + low, count, a_.k(), spare.get(), out);
      for (int j = 0; j < a_.k(); j++) {
        out[j] += low;
      }
    };
    parallel_for(count_, task, 10.0 * keys_ * count_);
  }

  const Indexer& a_;
  const int b_, first_, count_, keys_;
  const size_t packed_;
  const AlignedFloats q_;
  const std::unique_ptr<uint32_t[]> scores_;
  std::vector<int> low_, high_;
};

}  // namespace

void indexer_topk(const Indexer& a) {
  const size_t keys = std::max(a.keys.keys(), 1);
  const int step = static_cast<int>(std::max<size_t>(kMaxScores / keys, 1));
  for (int b = 0; b < a.q.shape(0); b++) {
    for (int first = 0; first < a.queries(); first += step) {
      Block(a, b, first, std::min(step, a.queries() - first)).run();
    }
  }
}

}  // namespace cpu

void IndexerTopk::eval_cpu(
    const std::vector<mx::array>& inputs,
    std::vector<mx::array>& outputs) {
  const auto task = [layout = layout_, scale = scale_, reference = reference_](
                        const auto& in, auto& out) {
    const cpu::RowArray keys(in[1]);
    const cpu::Indexer a{in[0], keys, in[2], in[3], layout, scale, out[0]};
    if (reference) {
      reference::indexer_topk(a);
    } else {
      cpu::indexer_topk(a);
    }
  };
  cpu::dispatch(*this, inputs, outputs, task);
}

}  // namespace glm_fused
